"""The parent's side of worlds in child processes: deadlines, and what happens to episodes whose process is gone."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from configs.redaction import public_environment
from rollout_workers.environments.protocol import Episode, Step

LONGEST_LINE = 16 << 20
SERVER = "rollout_workers.environments.server"


class WorldError(RuntimeError):
    """A world answered with an exception."""


class WorldLost(RuntimeError):
    """A child process has ended."""

    kind = "environment_lost"


class WorldLate(WorldLost):
    """A child process did not answer in time."""

    kind = "environment_timeout"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """An episode that cannot go on. ``Lost(kind="environment_timeout", message="no answer to 'wait' within 2 s")``."""

    kind: str
    message: str


class WorldProcess:
    """One child process."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        paths = os.pathsep.join(dict.fromkeys(os.path.abspath(path) for path in sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-m", SERVER, json.dumps({"name": name, "options": dict(options)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=public_environment() | {"PYTHONPATH": paths},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout.fileno()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.answers, selectors.EVENT_READ)

    def ask(self, seconds: float, **request: Any) -> Any:
        """The answer to a request.

        Raises:
            WorldError: it is an exception.
            WorldLate: there is none within ``seconds``.
            WorldLost: there will be none.
        """
        deadline, line = time.monotonic() + seconds, b""
        try:
            self.requests.write(json.dumps(request).encode() + b"\n")
            self.requests.flush()
        except OSError as error:
            raise WorldLost(f"the environment's process has ended ({self.process.poll()})") from error
        while not line.endswith(b"\n"):  # one request at a time: nothing can follow the line
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                raise WorldLate(f"no answer to {request['call']} {request.get('text', '')!r:.60} within {seconds:g} s")
            part = os.read(self.answers, 65536)
            if not part:
                raise WorldLost(f"the environment's process has ended ({self.process.wait()})")
            line += part
            if len(line) > LONGEST_LINE:
                raise WorldLost(f"the answer to {request['call']} has more than {LONGEST_LINE} bytes")
        reply = json.loads(line)
        if "error" in reply:
            raise WorldError(reply["error"])
        return reply["result"]

    def kill(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.selector.close()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Worlds:
    """Episodes played side by side, number ``i`` of them in child process ``i % processes``."""

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        processes: int = 1,
        step_seconds: float = 30.0,
        reset_seconds: float = 120.0,
    ) -> None:
        self.name, self.options, self.step_seconds, self.reset_seconds = name, options, step_seconds, reset_seconds
        self.children: list[WorldProcess | None] = [None] * processes
        self.episodes: list[Episode] = []
        self.acted: list[list[str]] = []
        self.homes: list[WorldProcess | None] = []
        """The child that each episode's world is in now; another one once that was killed."""

    def begin(self, episodes: Sequence[Episode]) -> list[str]:
        """Leave all episodes and begin these; their opening observations.

        Raises:
            ValueError: an environment cannot be started, or not in time (twice).
        """
        self.episodes, self.acted, self.homes = list(episodes), [[] for _ in episodes], [None] * len(episodes)
        openings: list[str] = [""] * len(episodes)

        def reset(slot: int) -> None:
            openings[slot] = self._opened(slot)

        self._side_by_side(list(range(len(episodes))), reset)
        return openings

    def step(self, actions: Mapping[int, str]) -> dict[int, Step | Lost]:
        """Act in these episodes (by number), once each."""
        found: dict[int, Step | Lost] = {}

        def act(slot: int) -> None:
            found[slot] = self._step(slot, actions[slot])

        self._side_by_side(list(actions), act)
        return found

    def gold(self, slot: int) -> list[str]:
        """The gold path of an episode just begun.

        Raises:
            ValueError: the environment fails to make one.
        """
        try:
            return list(self._child(slot).ask(self.reset_seconds, slot=slot, call="gold"))
        except (WorldError, WorldLost) as error:
            raise ValueError(f"{self.name} makes no gold path of {dict(self.episodes[slot])}: {error}") from error

    def close(self) -> None:
        """End the child processes."""
        for place, child in enumerate(self.children):
            if child is not None:
                child.kill()
                self.children[place] = None

    def _side_by_side(self, slots: Sequence[int], work: Any) -> None:
        """``work`` for each slot; slots of one process one after the other."""

        def of_process(place: int) -> None:
            for slot in slots:
                if slot % len(self.children) == place:
                    work(slot)

        with ThreadPoolExecutor(len(self.children)) as threads:
            list(threads.map(of_process, range(len(self.children))))

    def _child(self, slot: int) -> WorldProcess:
        place = slot % len(self.children)
        child = self.children[place]
        if child is None:
            child = self.children[place] = WorldProcess(self.name, self.options)
        return child

    def _reset(self, slot: int) -> str:
        child = self._child(slot)
        opening = str(child.ask(self.reset_seconds, slot=slot, call="reset", episode=dict(self.episodes[slot])))
        self.homes[slot] = child
        return opening

    def _opened(self, slot: int) -> str:
        for last in (False, True):
            try:
                return self._reset(slot)
            except WorldError as error:
                raise ValueError(f"{self.name} cannot begin {dict(self.episodes[slot])}: {error}") from error
            except WorldLost as error:
                self._drop(slot)
                if last:
                    raise ValueError(f"{self.name} cannot begin {dict(self.episodes[slot])}: {error}") from error
        raise AssertionError("the second try returns or raises")

    def _step(self, slot: int, text: str) -> Step | Lost:
        try:
            if self.homes[slot] is not self._child(slot):  # its process was killed for a neighbour's sake
                self._again(slot)
            result = self._child(slot).ask(self.step_seconds, slot=slot, call="step", text=text)
        except WorldError as error:
            return Lost(kind="environment_error", message=str(error))
        except WorldLost as error:
            self._drop(slot)
            return Lost(kind=error.kind, message=str(error))
        self.acted[slot].append(text)
        return Step(**result)

    def _again(self, slot: int) -> None:
        """Bring an episode back to where it was, in a new process."""
        self._reset(slot)
        for text in self.acted[slot]:
            self._child(slot).ask(self.step_seconds, slot=slot, call="step", text=text)

    def _drop(self, slot: int) -> None:
        place = slot % len(self.children)
        child, self.children[place] = self.children[place], None
        if child is not None:
            child.kill()
