"""Hashes of the small files of a run folder, so that damage is detected.

``<run>/manifest.json`` has two hashes of each: the one in force, and the one before or to come (a kill may fall between
the two writes); of the config it has the text, too, so that it can be put back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.runs.layout import CONFIG, EVALUATION, EVENTS, MANIFEST, MLFLOW, OUTCOMES, SUMMARY, stage_record
from pipeline.storage.atomic import sealed, sha256_file, unseal, write_atomic

_PATTERNS = (CONFIG, SUMMARY, stage_record("*"), EVALUATION, OUTCOMES, MLFLOW)


def put(run_dir: Path, name: str, data: bytes, *, keep: bool = False) -> None:
    """Write ``run_dir/name`` whole, and know it by its hash from then on; with ``keep`` (for texts) also by what it
    says."""
    _expect(run_dir, name, hashlib.sha256(data).hexdigest(), data.decode() if keep else None)
    path = run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def put_json(run_dir: Path, name: str, value: Mapping[str, Any]) -> None:
    """``put`` of JSON."""
    put(run_dir, name, json.dumps(value, indent=1).encode())


def kept(run_dir: Path, name: str) -> str | None:
    """What a file said that was put with ``keep``; ``None`` where that is not known."""
    try:
        text = unseal(run_dir / MANIFEST).get("texts", {}).get(name)
    except (OSError, ValueError):
        return None
    return text if isinstance(text, str) else None


def renew(run_dir: Path, keep: str) -> None:
    """Know all small files as they are now, and the text of ``keep``: after the manifest itself was damaged or lost."""
    (run_dir / MANIFEST).unlink(missing_ok=True)
    for name in sorted(path.relative_to(run_dir).as_posix() for pattern in _PATTERNS for path in run_dir.glob(pattern)):
        _expect(run_dir, name, sha256_file(run_dir / name), (run_dir / name).read_text() if name == keep else None)


def know(run_dir: Path, name: str) -> None:
    """Take a file that was just written by other means as it is."""
    _expect(run_dir, name, sha256_file(run_dir / name))


def problems(run_dir: Path) -> dict[str, str]:
    """What is wrong with the small files, by name; nothing is known of runs of versions before this."""
    try:
        known = unseal(run_dir / MANIFEST)["files"]
    except FileNotFoundError:
        # A run that has events was begun by a version that keeps the manifest from the first moment on.
        return (
            {MANIFEST: "is missing: whether the run's other files are what was written is not known"}
            if _has_events(run_dir)
            else {}
        )
    except (ValueError, OSError, LookupError) as error:
        return {MANIFEST: f"{error}; whether the run's other files are what was written is not known"}
    found: dict[str, str] = {} if _has_events(run_dir) else {EVENTS: "is missing or empty"}
    for name, hashes in known.items():
        path = run_dir / name
        if not path.is_file():
            found[name] = "is missing"
        elif sha256_file(path) not in hashes:
            found[name] = "is not what was written: it was changed or damaged"
    return found


def _has_events(run_dir: Path) -> bool:
    path = run_dir / EVENTS
    return path.is_file() and path.stat().st_size > 0


def _expect(run_dir: Path, name: str, digest: str, text: str | None = None) -> None:
    try:
        content = unseal(run_dir / MANIFEST)
        known, texts = content["files"], content.get("texts", {})
    except (FileNotFoundError, ValueError, LookupError):
        known, texts = {}, {}
    before = known.get(name, [""])[-1]
    texts = texts | ({} if text is None else {name: text})
    write_atomic(run_dir / MANIFEST, sealed({"files": known | {name: [before, digest]}, "texts": texts}))
