"""Requests to a bank's training at work, as small files in its folder: stop a policy, or start one (again)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal

from pipeline.storage.atomic import write_atomic

Wanted = Literal["start", "stop"]
FOLDER = ".requests"
"""No policy can be called so"""
EVERY = 1.0
"""Seconds between two looks."""
_LARGEST = 1 << 10


def ask(out: Path, name: str, wanted: Wanted) -> None:
    """Ask the training in ``out`` to start or stop a policy, whose run folder is there already."""
    (out / FOLDER).mkdir(exist_ok=True)
    write_atomic(out / FOLDER / f"{name}.json", json.dumps({"wanted": wanted}).encode())


class Inbox:
    """``Inbox(out).take()`` has what was asked for since, by name."""

    def __init__(self, out: Path) -> None:
        self.folder, self._looked = out / FOLDER, 0.0
        for path in self.folder.glob("*.json"):  # to an earlier start
            path.unlink()

    def take(self) -> dict[str, Wanted]:
        """Requests not taken before; nothing where it was looked less than ``EVERY`` seconds ago."""
        if time.monotonic() - self._looked < EVERY:
            return {}
        self._looked = time.monotonic()
        found: dict[str, Wanted] = {}
        for path in sorted(self.folder.glob("*.json")):
            wanted = _read(path)
            path.unlink(missing_ok=True)
            if wanted is not None:
                found[path.stem] = wanted
        return found


def _read(path: Path) -> Wanted | None:
    """``None`` for what ``ask`` did not write."""
    try:
        content = json.loads(path.read_bytes()[:_LARGEST])
    except (OSError, ValueError, RecursionError):
        return None
    wanted = content.get("wanted") if isinstance(content, dict) else None
    return wanted if wanted in ("start", "stop") else None
