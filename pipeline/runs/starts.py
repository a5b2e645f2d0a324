"""Beginning and end of a start of a run, as events."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.runs import manifest
from pipeline.runs.environment import git_commit
from pipeline.runs.errors import RunError, first_line
from pipeline.runs.events import Events
from pipeline.storage import disk_space


@contextmanager
def noted(run_dir: Path) -> Iterator[None]:
    """Beginning and end of a start of a run as events.

    Raises:
        RunError: in the place of whatever a full disk led to.
    """
    events = Events(run_dir)
    events.mend()
    events.note("started", f"started by process {os.getpid()} on {socket.gethostname()}", git_commit=git_commit())
    try:
        yield
    except KeyboardInterrupt as signal:
        note_end(run_dir, "stopped", f"ended by {str(signal) or 'SIGINT'}")
        raise
    except BaseException as error:  # whatever it is, the event names it and it goes on up
        where = [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)[-4:]
        ]
        cause = getattr(error, "cause", None) or error  # of what went wrong inside of an actor
        if disk_space.is_full(error):
            text = disk_space.full(run_dir)
            note_end(run_dir, "failed", text, error=type(cause).__name__, where=where)
            raise RunError(text) from error
        note_end(run_dir, "failed", first_line(cause), error=type(cause).__name__, where=where)
        raise
    note_end(run_dir, "finished", "all stages are done")


def note_end(run_dir: Path, kind: str, text: str, **facts: Any) -> None:
    """Note how a start ended, and record the logs as they are now."""
    Events(run_dir).note(kind, text, **facts)
    with suppress(OSError):  # a full disk is reported already
        manifest.know(run_dir, ())
