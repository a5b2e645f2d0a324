"""Ends a run that hangs, and leaves behind where."""

from __future__ import annotations

import faulthandler
from pathlib import Path
from types import TracebackType

from pipeline.runs.layout import STALL


class Watchdog:
    """``with Watchdog(run_dir, 3600) as dog: ... dog.pat()``: unless patted in time, every thread's stack is written to
    ``<run>/stall.txt`` and the process exits with 1, whatever it hangs in (the timer is C code, beyond the
    interpreter's lock). One at a time in a process.
    """

    def __init__(self, run_dir: Path, seconds: float) -> None:
        self._path, self._seconds = run_dir / STALL, seconds

    def __enter__(self) -> Watchdog:
        self._file = self._path.open("w")  # what an earlier start left is out of date
        self.pat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._path.unlink()

    def pat(self) -> None:
        """The run makes progress: count from 0 again."""
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)
