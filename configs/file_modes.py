"""The permissions that new files have: safetensors and temporary files are made private."""

from __future__ import annotations

import os
from pathlib import Path


def _umask() -> int:
    """The process's umask. Reading it means setting it, which other threads could notice: done once, at import."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


UMASK = _umask()


def as_new(path: Path) -> None:
    """Let a file, or every file in a folder, be read by whom the umask lets read new files: runs are shared."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode & 0o111 | 0o666 & ~UMASK)
