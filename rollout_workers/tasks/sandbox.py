"""Calls a user's functions in a process of its own, with limits of time and memory: whatever it does, the caller goes
on.

One request is open at a time, under an id that nobody can guess, and only an answer with that id is its verdict. An
item that raises, hangs, needs too much memory or ends its process is a ``Failure`` of that item; the process is started
again where needed and the items after it are judged all the same.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rollout_workers.judging.typed import encode
from rollout_workers.tasks.child import LOADING_SECONDS, Child, Ended, readable
from rollout_workers.tasks.protocol import Failure


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """Which function, and its limits. ``Function(path="reward.py", name="reward", seconds=5.0, megabytes=1024)``."""

    path: str
    name: str
    seconds: float
    """For one response."""
    megabytes: int
    """Of address space, for the whole process."""
    network: bool = False
    """It may open connections."""
    processes: bool = False
    """It may start other programs."""
    variables: tuple[str, ...] = ()
    """Environment variables that it may see, by name."""
    tools: tuple[str, ...] = ()
    """In place of ``name``: functions that are called with the arguments that a model wrote, and return a text."""
    place: str = "task.options.python"
    """Where the config has them, for messages."""


class Isolation:
    """A process that calls ``function``; it starts with the first batch and ends with this object."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.printed = ""
        """The start of what the function printed in the last batch that had it print."""
        self.schemas: list[dict[str, Any]] = []
        """Of tools, once the process has started"""
        self._child: Child | None = None
        self._token = ""

    def call(self, rows: Sequence[Mapping[str, object]], responses: Sequence[str]) -> list[dict[str, float] | Failure]:
        """What the function returned for each pair, as a mapping of floats (a bare number is ``reward``), or why there
        is no value.

        Raises:
            ValueError: the function cannot be loaded.
        """
        return [_numbers(self._call(row, text)) for row, text in zip(rows, responses, strict=True)]

    def tool(self, name: str, arguments: Mapping[str, object]) -> str | Failure:
        """What the tool returned, or why there is nothing; ``ValueError`` where the file cannot be loaded."""
        said = self._call(arguments, name)
        return said if isinstance(said, Failure) else str(said["value"])

    def start(self) -> None:
        """Load the file; ``ValueError`` where that cannot be done."""
        self._start()

    def close(self) -> None:
        """End the process, and all that it started."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def _call(self, row: Mapping[str, object], response: str) -> dict[str, Any] | Failure:
        child, name = self._start(), secrets.token_hex(8)
        try:
            child.send({"id": name, "row": encode(dict(row), str), "response": response})
            said = self._answer(child, name, self.function.seconds)
        except Ended as ended:
            self.close()
            return Failure(kind=ended.args[0], message=ended.args[1])
        if "spent" in said:
            self.close()
        return self._value(said)

    def _start(self) -> Child:
        if self._child is not None:
            return self._child
        f, self._token = self.function, secrets.token_hex(8)
        what = "file of tools" if f.tools else "reward function"
        settings = asdict(f) | {"token": self._token}
        child = Child("function", settings, settings.pop("variables"))
        try:
            said = self._answer(child, self._token, LOADING_SECONDS)
        except Ended as ended:
            raise ValueError(
                f"the {what} of {f.path} does not load: {ended.args[1]}; mend it, or raise megabytes"
            ) from ended
        if "failure" in said:
            child.end()
            raise ValueError(f"the {what} {f.name!r} of {f.path} does not load: {readable(said['message'])}")
        self._child, self.schemas = child, said.get("schemas", [])
        return child

    def _answer(self, child: Child, name: str, seconds: float) -> dict[str, Any]:
        """The answer to the open request ``name``; ``Ended`` where something else was written there, or the process is
        gone."""
        while not (line := child.line(seconds)):
            pass  # between two lines, see _tell in function.py
        try:
            said = json.loads(line)
            known = said["id"]
        except (ValueError, TypeError, LookupError, RecursionError):
            said, known = {}, ""
        if known == self._token and "ended" in said:
            how = "was lost" if said["ended"] is None else f"ended with {said['ended']}"
            raise Ended("reward_crash", f"the process {how} (out of memory, or it ended itself)")
        if known != name:
            raise Ended("reward_channel", "the function wrote to the channel of its process, or a copy of it did")
        return dict(said)

    def _value(self, said: dict[str, Any]) -> dict[str, Any] | Failure:
        self.printed = readable(said.get("printed", self.printed))
        if "failure" in said:
            return Failure(kind=said["failure"], message=readable(said["message"]))
        return said


def _numbers(said: dict[str, Any] | Failure) -> dict[str, float] | Failure:
    """The value of a reward function."""
    if isinstance(said, Failure):
        return said
    return {part: float.fromhex(number) for part, number in said["value"].items()}
