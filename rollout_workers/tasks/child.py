"""A child process that judges, from the worker's side: lines of JSON both ways, deadlines, and an end to all that it
started."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOADING_SECONDS = 120.0
"""What imports torch on a busy machine needs many of these."""
LONGEST_LINE = 1 << 20
# What a judge may see of the worker's environment: how to find programs and packages, no credentials.
PASSED = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "HOME")
# Our modules are found without being installed, and hide none of the judge's own afterwards.
_START = """
import sys
sys.path.insert(0, {root!r})
from rollout_workers.judging.{module} import main
sys.path.remove({root!r})
main()
"""


def _environment(variables: Sequence[str]) -> dict[str, str]:
    """What is passed on. Relative places of modules are this process's: the child works in a folder that anybody may
    write to."""
    kept = {name: os.environ[name] for name in (*PASSED, *variables) if name in os.environ}
    if places := [os.path.abspath(place) for place in kept.get("PYTHONPATH", "").split(os.pathsep) if place]:
        kept["PYTHONPATH"] = os.pathsep.join(places)
    return kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Ended(Exception):
    """The process is gone, or had to go: the kind of failure, and why."""


class Child:
    """A running ``rollout_workers.judging.<module>``; it ends with this object."""

    def __init__(self, module: str, settings: Mapping[str, object], variables: Sequence[str] = ()) -> None:
        """``variables``: names of environment variables that it sees besides ``PASSED``."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START.format(root=str(ROOT), module=module), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
            env=_environment(variables),
            start_new_session=True,
        )
        self._finish: Callable[[], object] = weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._unread = b""

    def send(self, message: Mapping[str, object]) -> None:
        """Hand a message over; ``Ended`` where the process does not read it."""
        left = memoryview(json.dumps(message, default=str).encode() + b"\n")
        deadline = time.monotonic() + LOADING_SECONDS
        while left:
            if not select.select([], [self._in], [], max(0.0, deadline - time.monotonic()))[1]:
                raise Ended("reward_timeout", "the process did not read its batch")
            try:
                left = left[os.write(self._in, left) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Ended("reward_crash", "the process ended while it waited for a batch") from None

    def line(self, seconds: float) -> bytes:
        """The next line, of at most ``LONGEST_LINE`` bytes; ``Ended`` where none comes in time."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            if len(self._unread) > LONGEST_LINE:
                raise Ended("reward_channel", "something else than verdicts was written to the channel of the process")
            if not select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise Ended("reward_timeout", f"no answer within {seconds:g} s; raise task.options.limits.seconds")
            chunk = os.read(self._out, 1 << 16)
            if not chunk:
                raise Ended("reward_crash", "the process is gone")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def end(self) -> None:
        """End the process, and all that it started."""
        self._finish()  # once: later the number may be another process's


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close its pipes, at which it kills what it started; then kill the whole session, and read the exit status."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=2.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def readable(text: str) -> str:
    """Without what a terminal obeys: ``\\x1b[2J`` as it is written here."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
