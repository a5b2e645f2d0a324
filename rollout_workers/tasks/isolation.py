"""Calls a reward function in a process of its own, with limits of time and memory: whatever it does, the caller goes on.

A batch crosses the pipe once. An item that raises, hangs, needs too much memory or ends its process is a ``Failure`` of that item; the
process is started anew where needed and the items after it are judged all the same.
"""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_workers.tasks.protocol import Failure

INSIDE = Path(__file__).with_name("isolated.py")
LOADING_SECONDS = 120.0
"""A reward file that imports torch on a busy machine needs many of these."""
# What a reward function may see of the worker's environment: how to find programs and packages, no credentials.
PASSED = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "HOME")


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """Which function, and its limits. ``Function(path="reward.py", name="reward", seconds=5.0, megabytes=1024)``."""

    path: str
    name: str
    seconds: float
    """For one response."""
    megabytes: int
    """Of address space, for the whole process."""


class _Ended(Exception):
    """The process is gone, or was too slow and had to go."""


class Isolation:
    """A process that calls ``function``; it starts with the first batch and ends with this object."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.printed = ""
        """The start of what the function printed in the last batch that had it print."""
        self._process: subprocess.Popen[bytes] | None = None
        self._finish: Callable[[], object] = lambda: None
        self._unread = b""

    def call(self, rows: Sequence[Mapping[str, object]], responses: Sequence[str]) -> list[object | Failure]:
        """What the function returned for each pair, or why there is no value.

        Raises:
            ValueError: the function cannot be loaded.
        """
        items = [{"row": dict(row), "response": text} for row, text in zip(rows, responses, strict=True)]
        found: list[object | Failure] = []
        while len(found) < len(items):
            self._start()
            try:
                self._send(items[len(found) :])
                while len(found) < len(items):
                    found.append(self._value(self._line(self.function.seconds)))
            except _Ended as ended:
                found.append(Failure(kind=ended.args[0], message=ended.args[1]))
        return found

    def close(self) -> None:
        """End the process, and all that it started."""
        if self._process is not None:
            self._finish()  # once: later the number may be another process's
            self._process, self._unread = None, b""

    def _start(self) -> None:
        if self._process is not None:
            return
        f = self.function
        settings = {"path": f.path, "function": f.name, "megabytes": f.megabytes, "alarm": int(2 * f.seconds) + 2}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(INSIDE), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
            env={name: os.environ[name] for name in PASSED if name in os.environ} | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self._finish = weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        try:
            said = json.loads(self._line(LOADING_SECONDS))
        except _Ended as ended:
            raise ValueError(f"the reward function of {f.path} does not load: {ended.args[1]}; mend it, or raise megabytes") from ended
        if "failure" in said:
            self.close()
            raise ValueError(f"the reward function {f.name!r} of {f.path} does not load: {said['message']}")

    def _send(self, items: Sequence[Mapping[str, object]]) -> None:
        """Hand a batch over; a process that does not read it is ended."""
        assert self._process is not None and self._process.stdin is not None
        pipe, left = self._process.stdin.fileno(), memoryview(json.dumps(items, default=str).encode() + b"\n")
        deadline = time.monotonic() + LOADING_SECONDS
        while left:
            if not select.select([], [pipe], [], max(0.0, deadline - time.monotonic()))[1]:
                self._ended("reward_timeout", "the process did not read its batch")
            try:
                left = left[os.write(pipe, left) :]
            except BrokenPipeError:
                self._ended("reward_crash", "the process ended while it waited for a batch")

    def _line(self, seconds: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._ended("reward_timeout", f"no answer within {seconds:g} s")
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                self._ended("reward_crash", "")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ended(self, kind: str, why: str) -> None:
        assert self._process is not None
        process = self._process
        if not why:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed the pipe and live on
                process.wait(timeout=2.0)
            why = f"the process ended with {process.returncode} (out of memory, or it ended itself)"
        self.close()
        raise _Ended(kind, why)

    def _value(self, line: bytes) -> object | Failure:
        said: dict[str, Any] = json.loads(line)
        self.printed = said.get("printed", self.printed)
        return Failure(kind=said["failure"], message=said["message"]) if "failure" in said else said["value"]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process's whole session and read its exit status."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
