"""A warm parent that forks for each response: the fork judges it and ends, so that no response meets another one's
traces.

The parent has imported what the verifier needs, sits behind walls, and never looks at a response. A line of JSON comes
in for each batch; lines go out with verdicts as they come, with the batch's id and the places in it. What a fork says
is handed on as text, for the worker to check: it may be lies, but only about its own response.

Responses of digits, brackets and the signs + - * / alone share a fork. There is no name in them, so nothing that they
could call, assign or import, and a fork costs more than judging fifty of them. Should one end or stall its fork, the
rest are judged each in their own.
"""

from __future__ import annotations

import gc
import json
import os
import re
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, BinaryIO

from rollout_workers.judging import walls
from rollout_workers.judging.outcome import Caught
from rollout_workers.judging.typed import decode

Judge = Callable[[Any, str], float]
_ARITHMETIC = re.compile(r"(?!.*(\*\*|//))[0-9 +\-*/()\[\].,]{1,200}")
_LONGEST_REPLY = 1 << 12
_TOGETHER = 0.02
"""Seconds: verdicts of a shared fork are said together that long, for each time the parent and the worker wake up."""
_TIGHT = 256
"""So many responses share a fork at least, where there are as many: two forks at once cost more than they save."""
_FEW = 8
"""The same, once it is known that they take long."""
_LONG = 0.25
"""Seconds after which a shared fork leaves the rest to others, which then run at once."""


@dataclass(frozen=True, slots=True)
class ZygoteSettings:
    """Of the process: ``ZygoteSettings(module="rollout_workers.judging.gym", seconds=5.0, megabytes=2048, parallel=2,
    unconfined=False)``."""

    module: str
    seconds: float
    megabytes: int
    parallel: int
    unconfined: bool


@dataclass(slots=True)
class _Fork:
    pid: int
    pipe: int
    places: deque[int]
    """Not judged yet."""
    count: int
    """Places at its start."""
    deadline: float
    unread: bytes = b""


@dataclass(slots=True)
class Batch:
    """One batch on its way: what is asked, what waits, what runs."""

    settings: ZygoteSettings
    judge: Judge
    asked: Sequence[tuple[Any, str]]
    filter: walls.Filter | None
    tell: Callable[..., None]
    channel: tuple[int, ...]
    """Descriptors that no fork may keep."""
    waiting: deque[list[int]] = field(default_factory=deque)
    running: dict[int, _Fork] = field(default_factory=dict)

    def run(self) -> None:
        """Tell a verdict for every place, in whatever order they come."""
        shared = [place for place, (_, text) in enumerate(self.asked) if _ARITHMETIC.fullmatch(text)]
        alone = set(range(len(self.asked))) - set(shared)
        self._share(shared, _TIGHT)
        self.waiting.extend([place] for place in sorted(alone))
        poll = select.poll()
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.settings.parallel:
                poll.register(self._start(self.waiting.popleft()), select.POLLIN)
            soonest = min(fork.deadline for fork in self.running.values())
            for pipe, _ in poll.poll(max(0.0, 1000 * (soonest - time.monotonic())) + 1):
                if not self._read(self.running[pipe]):
                    poll.unregister(pipe)
            for fork in [f for f in self.running.values() if f.deadline < time.monotonic()]:
                poll.unregister(fork.pipe)
                self._end(fork, "timeout")

    def _share(self, places: Sequence[int], least: int) -> None:
        """Let these share as many forks as run at once, or fewer with at least ``least`` each."""
        size = max(least, -(-len(places) // self.settings.parallel))
        self.waiting.extend(list(places[start : start + size]) for start in range(0, len(places), size))

    def _start(self, places: list[int]) -> int:
        mine, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            for descriptor in (mine, *self.running, *self.channel):
                os.close(descriptor)
            self._inside(theirs, places)
        os.close(theirs)
        self.running[mine] = _Fork(pid, mine, deque(places), len(places), time.monotonic() + self.settings.seconds)
        return mine

    def _inside(self, pipe: int, places: list[int]) -> None:
        """The fork: walls, then verdicts, then the end, with no way back."""
        try:
            walls.die_with_parent()
            walls.limit(megabytes=self.settings.megabytes, seconds=self.settings.seconds * len(places), writes=False)
            if self.filter is None or self.filter.install():
                self._judge(pipe, places)
        finally:
            os._exit(1)

    def _judge(self, pipe: int, places: list[int]) -> None:
        said, since = b"", time.monotonic()
        leave = since + _LONG
        for place in places:
            if since > leave:
                break
            with Caught() as call:
                value = float(self.judge(*self.asked[place])).hex()
            if isinstance(call.error, MemoryError) and len(places) > 1:
                os.write(pipe, said)
                os._exit(1)  # perhaps the others' memory: each is judged again, alone
            said += (value if call.error is None else json.dumps(call.failure())).encode() + b"\n"
            if time.monotonic() - since > _TOGETHER:
                os.write(pipe, said)
                said, since = b"", time.monotonic()
        os.write(pipe, said)
        os._exit(0)

    def _read(self, fork: _Fork) -> bool:
        """Take what it said; whether more is to come."""
        said = os.read(fork.pipe, 1 << 16)
        fork.unread += said
        *lines, fork.unread = fork.unread.split(b"\n")
        if lines and fork.places:
            texts = [line[:_LONGEST_REPLY].decode("ascii", "replace") for line in lines[: len(fork.places)]]
            self.tell(places=[fork.places.popleft() for _ in texts], said=texts)
            fork.deadline = time.monotonic() + self.settings.seconds + _TOGETHER
        if said and fork.places and len(fork.unread) <= _LONGEST_REPLY:
            return True
        self._end(fork, "")
        return False

    def _end(self, fork: _Fork, why: str) -> None:
        """Kill it, and see to what it has not judged: alone where it shared the fork, else that is the verdict."""
        del self.running[fork.pipe]
        os.close(fork.pipe)
        if fork.places and not why:
            why = _status(fork.pid)
        else:
            os.kill(fork.pid, signal.SIGKILL)
            os.waitpid(fork.pid, 0)
        if 0 < len(fork.places) < fork.count and why == "0":  # it left; one that judged nothing would leave for ever
            self._share(list(fork.places), _FEW)
        elif fork.count > 1:
            self.waiting.extend([place] for place in fork.places)
        elif fork.places:
            self.tell(places=[fork.places[0]], ended=why)


def _status(pid: int) -> str:
    """How a fork that closed its pipe ended; it gets a second for that."""
    for _ in range(200):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return {-signal.SIGXCPU: "timeout", -signal.SIGSYS: "refused"}.get(code, str(code))
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timeout"


class Server:
    """The parent: makes judges, and runs the batches it is sent."""

    def __init__(self, settings: ZygoteSettings, requests: BinaryIO, answers: BinaryIO) -> None:
        self.settings, self.requests, self.answers = settings, requests, answers
        self.judges: dict[str, Judge] = {}
        self.module = import_module(settings.module)
        self.standing: list[str] = []
        self.filter: walls.Filter | None = None

    def tell(self, **said: Any) -> None:
        """One line to the worker."""
        self.answers.write(json.dumps(said).encode() + b"\n")
        self.answers.flush()

    def serve(self) -> None:
        """Until the worker closes the pipe. The first batch's judge is made before the walls go up, with all that it
        loads."""
        for line in self.requests:
            batch = json.loads(line)
            judge = self._judge(batch["id"], batch["judge"])
            if judge is None:
                continue
            if not self.standing:
                self.standing, self.filter = walls.build(walls.what_python_reads())
            if (gone := walls.missing(self.standing)) and not self.settings.unconfined:
                self.tell(id=batch["id"], unconfined=gone)
                continue
            rows = [decode(row) for row in batch["rows"]]
            asked = [(rows[row], text) for row, text in batch["asked"]]
            channel = (self.requests.fileno(), self.answers.fileno())
            Batch(self.settings, judge, asked, self.filter, partial(self.tell, id=batch["id"]), channel).run()

    def _judge(self, name: str, settings: Any) -> Judge | None:
        key = json.dumps(settings)
        if key not in self.judges:
            with Caught() as making:
                self.judges[key] = self.module.make(decode(settings))
            if making.error is not None:
                self.tell(id=name, broken=making.failure()["message"])
                return None
            gc.collect()
            gc.freeze()  # no fork walks through all of this, which would copy it
        return self.judges[key]


def main() -> None:
    """Serve over the descriptors 0 and 1, which point to nothing for all that is loaded."""
    settings = ZygoteSettings(**json.loads(sys.argv[1]))
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    sys.dont_write_bytecode = True
    gc.disable()
    Server(settings, requests, answers).serve()
