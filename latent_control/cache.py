"""Models made once from other files and kept on this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


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
