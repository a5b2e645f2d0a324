"""Hashes of the files of a run folder, so that damage and exchange are detected.

``<run>/manifest.json`` has of each file the hash in force (while it is replaced, the one before, too: a kill may fall
between the two writes); of each log, which only grows, length and hash of its first bytes; of the config also the
text, so that it can be put back. A checkpoint is known by its own manifest, which has the hashes of its files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.redaction import without_secrets
from pipeline.runs.layout import (
    CONFIG,
    EVALUATION,
    EVENTS,
    MANIFEST,
    MANIFEST_LOCK,
    METRICS,
    MLFLOW,
    OUTCOMES,
    SUMMARY,
    stage_record,
)
from pipeline.storage.atomic import sealed, sha256_file, unseal, write_atomic
from pipeline.storage.locks import locked

_PATTERNS = (CONFIG, SUMMARY, stage_record("*"), EVALUATION, OUTCOMES, MLFLOW)
LOGS = (METRICS, EVENTS)
REMEDY = "bring it back from a copy; latent-control diagnose says what happened to the run"
_CHANGED = "is not what was written: it was changed or damaged"


def put(run_dir: Path, name: str, data: bytes, *, keep: bool = False) -> None:
    """Write ``run_dir/name`` whole, and know it by its hash from then on; with ``keep`` (for texts) also by what it
    says, secrets aside."""

    def expect(content: dict[str, Any]) -> None:
        before = content["files"].get(name, [""])[-1]
        content["files"][name] = [before, hashlib.sha256(data).hexdigest()]
        if keep:
            content["texts"][name] = without_secrets(data.decode())

    _change(run_dir, expect)
    path = run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def put_json(run_dir: Path, name: str, value: Mapping[str, Any]) -> None:
    """``put`` of JSON."""
    put(run_dir, name, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run folder; empty where there is no such file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object; {REMEDY}")
    return found


def kept(run_dir: Path, name: str) -> str | None:
    """What a file said that was put with ``keep``; ``None`` where that is not known."""
    text = _content(run_dir)["texts"].get(name)
    return text if isinstance(text, str) else None


def wrote(run_dir: Path, name: str, data: bytes) -> bool:
    """Whether a file had these bytes when it was put."""
    return hashlib.sha256(data).hexdigest() in _content(run_dir)["files"].get(name, [])


def renew(run_dir: Path, keep: str) -> None:
    """Know all small files as they are now, and the text of ``keep``: after the manifest itself was damaged or lost."""
    names = sorted(path.relative_to(run_dir).as_posix() for pattern in _PATTERNS for path in run_dir.glob(pattern))

    def known_again(content: dict[str, Any]) -> None:
        content |= {"files": {name: [sha256_file(run_dir / name)] for name in names}, "logs": {}, "texts": {}}
        if keep in names:
            content["texts"][keep] = without_secrets((run_dir / keep).read_text())

    _change(run_dir, known_again)


def know(run_dir: Path, names: Iterable[str], *, forget: Callable[[str], bool] = lambda name: False) -> None:
    """Take files that were written by other means as they are, and the logs with what they hold by now; those named by
    ``forget`` are known no longer."""
    hashes = {name: [sha256_file(run_dir / name)] for name in names}

    def settle(content: dict[str, Any]) -> None:
        files = {name: known for name, known in content["files"].items() if not forget(name)} | hashes
        # Once a file is there the hash before it counts no longer: an older state is not what was written.
        content["files"] = {
            name: known[-1:] if len(known) > 1 and _digest(run_dir / name) == known[-1] else known
            for name, known in files.items()
        }
        content["logs"] |= {name: _log(run_dir / name) for name in LOGS if (run_dir / name).is_file()}

    _change(run_dir, settle)


def know_own(run_dir: Path, path: Path) -> None:
    """``know`` of a file that a command after the run wrote, if it lies in the run folder and the manifest is whole."""
    with suppress(OSError, ValueError):  # ValueError: it lies elsewhere, or the manifest is damaged
        name = path.absolute().relative_to(run_dir.absolute()).as_posix()
        unseal(run_dir / MANIFEST)
        know(run_dir, [name])


def known(run_dir: Path) -> set[str]:
    """The names of the files and logs whose hashes are recorded."""
    content = _content(run_dir)
    return {*content["files"], *content["logs"]}


def grown(run_dir: Path, name: str) -> bool:
    """Whether a log is longer than when it was recorded last."""
    size, _ = _content(run_dir)["logs"].get(name, (math.inf, ""))
    return (run_dir / name).is_file() and (run_dir / name).stat().st_size > size


def problems(run_dir: Path) -> dict[str, str]:
    """What is wrong with the files, by name; nothing is known of runs of versions before this."""
    try:
        content = unseal(run_dir / MANIFEST)
        files, logs = content["files"], content.get("logs", {})
    except FileNotFoundError:
        # A run that has events was begun by a version that keeps the manifest from the first moment on.
        return (
            {MANIFEST: "is missing: whether the run's other files are what was written is not known"}
            if _has_events(run_dir)
            else {}
        )
    except (ValueError, OSError, LookupError) as error:
        said = str(error).removeprefix(MANIFEST).strip()
        return {MANIFEST: f"{said}; whether the run's other files are what was written is not known"}
    found: dict[str, str] = {} if _has_events(run_dir) else {EVENTS: "is missing or empty"}
    for name, hashes in files.items():
        digest = _digest(run_dir / name)
        if digest not in hashes and not (digest is None and Path(name).is_absolute()):  # a base LM may have moved
            found[name] = _CHANGED if digest else "is missing"
    for name, (size, digest) in logs.items():
        path = run_dir / name
        if not path.is_file() or path.stat().st_size < size:
            found.setdefault(name, "lost lines that were there when a stage ended")
        elif _log(path, size)[1] != digest:
            found[name] = "has lines changed, lost, moved or put in between"
    return found


def _has_events(run_dir: Path) -> bool:
    path = run_dir / EVENTS
    return path.is_file() and path.stat().st_size > 0


def _digest(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def _log(path: Path, size: int | None = None) -> list[Any]:
    """Length and hash of a log's first ``size`` bytes; of all of it."""
    data = path.read_bytes()[:size]
    return [len(data), hashlib.sha256(data).hexdigest()]


def _content(run_dir: Path) -> dict[str, Any]:
    """The manifest's content; empty where it is missing or damaged."""
    try:
        content = unseal(run_dir / MANIFEST)
    except (OSError, ValueError):
        content = {}
    return {"files": {}, "logs": {}, "texts": {}} | content


def _change(run_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Read, change and write the manifest: alone, for ``report`` may run beside the run itself."""
    with locked(run_dir / MANIFEST_LOCK):
        content = _content(run_dir)
        change(content)
        write_atomic(run_dir / MANIFEST, sealed(content))
