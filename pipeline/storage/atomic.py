"""Atomic writes, hashes and sealed JSON: a file is complete or absent. Shared by checkpoints and replay buffer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SEAL = "seal_sha256"


def _umask() -> int:
    """The process's umask. Reading it means setting it, which other threads could notice: done once, at import."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


UMASK = _umask()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Force a folder's entries (creations, renames) to the disk; a no-op where folders cannot be opened (Windows)."""
    if os.name != "nt":
        fsync_file(path)


def copy(path: Path, to: Path) -> None:
    """Copy a file or a folder; folders on the way are made. Not atomic: copy beside and rename where readers may
    look."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, to)
    else:
        shutil.copy2(path, to)


def write_atomic(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``: readers see the old bytes or the new ones, also after a crash."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o666 & ~UMASK)  # mkstemp makes it private; others may read runs on shared storage
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)  # gone already when it took its place
    fsync_folder(path.parent)


def _render(content: Mapping[str, Any], seal: str) -> bytes:
    return (json.dumps({**content, _SEAL: seal}, indent=1, sort_keys=True) + "\n").encode()


def sealed(content: Mapping[str, Any]) -> bytes:
    """JSON bytes of ``content`` with a hash of themselves inside, so that any flipped bit is detected.

    Keys must be strings all the way down; ``ValueError`` names what JSON cannot hold.
    """
    try:
        return _render(content, hashlib.sha256(_render(content, "")).hexdigest())
    except TypeError as error:
        raise ValueError(
            f"cannot be written as JSON: {error}; use strings, numbers, booleans, lists and dicts"
        ) from error


def unseal(path: Path) -> dict[str, Any]:
    """The content of a file of ``sealed`` bytes.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not exactly what ``sealed`` wrote.
    """
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    content.pop(_SEAL, None)
    if sealed(content) != data:
        raise ValueError(f"{path.name} does not match its own hash: it was changed or damaged after it was written")
    return content
