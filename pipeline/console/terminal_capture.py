"""Captures what C code and child processes write to the terminal while a live view owns it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TextIO

_PATIENCE = 1.0  # seconds; children that outlive the view hold the pipe open


class TerminalCapture:
    """From ``start`` to ``stop`` the standard streams that are terminals are passed to ``say``, line by line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._saved: dict[int, int] = {}
        self._reader: threading.Thread | None = None

    def start(self, terminal: TextIO) -> TextIO:
        """Redirect the streams; returns one that still writes to ``terminal``."""
        sys.stdout.flush()
        sys.stderr.flush()
        own = os.fdopen(os.dup(terminal.fileno()), "w", encoding=terminal.encoding, errors="replace")
        self._saved = {number: os.dup(number) for number in (1, 2) if os.isatty(number)}
        ours, theirs = os.pipe()
        for number in self._saved:
            os.dup2(theirs, number)
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, args=(ours,), name="captured", daemon=True)
        self._reader.start()
        return own

    def stop(self) -> None:
        """Restore the streams, after the last whole line was passed on."""
        for number, saved in self._saved.items():
            os.dup2(saved, number)
            os.close(saved)
        if self._reader is not None:
            self._reader.join(_PATIENCE)
        self._saved, self._reader = {}, None

    def _read(self, pipe: int) -> None:
        with os.fdopen(pipe, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.strip():
                    self._say(line.rstrip())
