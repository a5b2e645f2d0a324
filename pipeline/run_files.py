"""The small files of a run folder, each known by its hash, so that damage to one does not go unnoticed.

``<run>/manifest.json`` has two hashes of each: the one in force, and the one before or to come (a kill may fall between the two writes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.durable import sealed, sha256_file, unseal, write_atomic

MANIFEST = "manifest.json"


def put(run_dir: Path, name: str, data: bytes) -> None:
    """Write ``run_dir/name`` whole, and know it by its hash from then on."""
    import hashlib

    _expect(run_dir, name, hashlib.sha256(data).hexdigest())
    path = run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def put_json(run_dir: Path, name: str, value: Mapping[str, Any]) -> None:
    """``put`` of JSON."""
    put(run_dir, name, json.dumps(value, indent=1).encode())


def know(run_dir: Path, name: str) -> None:
    """Take a file that was just written by other means as it is."""
    _expect(run_dir, name, sha256_file(run_dir / name))


def problems(run_dir: Path) -> dict[str, str]:
    """What is wrong with the small files, by name; nothing is known of runs of versions before this."""
    try:
        known = unseal(run_dir / MANIFEST)["files"]
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, LookupError) as error:
        return {MANIFEST: f"{error}; delete it to accept the run's other files as they are"}
    found: dict[str, str] = {}
    for name, hashes in known.items():
        path = run_dir / name
        if not path.is_file():
            # The first hash is noted before the first write.
            found |= {name: "is missing"} if len(hashes) > 1 else {}
        elif sha256_file(path) not in hashes:
            found[name] = "is not what was written: it was changed or damaged"
    return found


def _expect(run_dir: Path, name: str, digest: str) -> None:
    try:
        known = unseal(run_dir / MANIFEST)["files"]
    except (FileNotFoundError, ValueError, LookupError):
        known = {}
    before = known.get(name, [""])[-1]
    write_atomic(run_dir / MANIFEST, sealed({"files": known | {name: [before, digest]}}))
