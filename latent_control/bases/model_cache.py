"""Models made once from other files and kept on this machine, and what files hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from latent_control.tensor_files import as_readable_as


def cache_root() -> Path:
    """Under ``XDG_CACHE_HOME``, else ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "latent-control"


def kept(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, made by ``make`` (which fills an empty one) if it is not there yet.

    Safe to call from several processes: the folder appears whole and synced, under its final name, or not at all.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        make(staged)
        os.chmod(staged, 0o755)  # mkdtemp makes it private
        as_readable_as(staged / "config.json")
        for path in staged.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _announce(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def _announce(staged: Path, folder: Path) -> None:
    """Give the finished folder its name; another process that was faster has made the same one."""
    try:
        staged.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


HASHES = "hashes"
SETTLED = 2.0
"""Seconds after which a changed file has another time of change on any file system: the hash of a younger one is not
remembered."""


def content_hash(path: Path) -> str:
    """SHA-256 of a file; remembered under the cache root for as long as the file is the same by place, inode, size and
    times.

    The time of change (ctime) cannot be set by programs, so a copy that keeps the old modification time is read again
    too.
    """
    path = path.resolve()
    record = cache_root() / HASHES / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    before = _marks(path)
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        said = json.loads(record.read_text(encoding="utf-8"))
        if said["marks"] == before:
            return str(said["sha256"])
    started = time.time()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if _marks(path) == before and started - path.stat().st_ctime > SETTLED:
        _remember(record, {"file": str(path), "marks": before, "sha256": found})
    return found


def _marks(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _remember(record: Path, said: dict[str, object]) -> None:
    """Whole or not at all; a cache that cannot be written costs time only."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        handle, staged = tempfile.mkstemp(prefix=f".{record.name}.tmp-", dir=record.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(said, file)
        os.chmod(staged, 0o644)  # mkstemp makes it private
        os.replace(staged, record)
    except OSError:
        return
