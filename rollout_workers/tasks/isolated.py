"""The inside of ``isolation``: a process that loads one reward function and calls it for batches. The standard library only.

Started by its path with a JSON of settings. A line of JSON comes in for each batch, a line goes out when the function is loaded,
then one for each item as soon as it is judged.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

LONGEST = 300


class NotANumber(Exception):
    """The function returned something else."""


class Outcome:
    """Keeps what a block raised. Users' code may raise anything, and nothing of it may end this process."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> Outcome:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.error = error
        return not isinstance(error, KeyboardInterrupt)

    def failure(self, file: str) -> dict[str, str]:
        """As it travels: the kind, and the error with the line of the user's file that it came from."""
        assert self.error is not None
        kinds: dict[type[BaseException], str] = {MemoryError: "reward_memory", NotANumber: "reward_invalid"}
        kind = next((kind for error, kind in kinds.items() if isinstance(self.error, error)), "reward_error")
        lines = [frame.lineno for frame in traceback.extract_tb(self.error.__traceback__) if frame.filename == file]
        place = f" (line {lines[-1]})" if lines else ""
        return {"failure": kind, "message": f"{type(self.error).__name__}: {str(self.error)[:LONGEST]}{place}"}


class Printed:
    """Stands for standard output: keeps the start of what is printed, drops the rest."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        """Takes any amount."""
        self.text += text[: max(0, LONGEST - len(self.text))]
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""

    def taken(self) -> dict[str, str]:
        """What was printed since the last time."""
        text, self.text = self.text, ""
        return {"printed": text} if text else {}


def load(path: str, name: str) -> Callable[..., Any]:
    """The function ``name`` of the file; neighbours of the file can be imported."""
    sys.path.append(str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("reward", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules["reward"] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def plain(value: Any) -> Any:
    """A number, or a mapping of numbers, as JSON has them (numpy's and torch's scalars have ``item``); ``NotANumber`` for others."""
    if isinstance(value, Mapping):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, bool | int | float):
        return value
    if hasattr(value, "item") and callable(value.item):
        return plain(value.item())
    raise NotANumber(f"returned {type(value).__name__} {str(value)[:60]!r}, not a number or a mapping of numbers")


def limit(megabytes: int) -> None:
    """Bounds this process's memory and writes no core files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def main() -> None:
    """Serve batches until the parent closes the pipe."""
    settings = json.loads(sys.argv[1])
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what is printed, by C code too, must not mix with the answers
        os.dup2(nothing, stream)
    printed = Printed()
    sys.stdout = sys.stderr = printed  # type: ignore[assignment]
    limit(settings["megabytes"])

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps({**value, **printed.taken()}).encode() + b"\n")
        answers.flush()

    with Outcome() as loading:
        function = load(settings["path"], settings["function"])
    if loading.error is not None:
        answer(loading.failure(settings["path"]))
        return
    answer({"ready": True})
    for line in requests:
        for item in json.loads(line):
            # Should the parent be gone, this process ends itself even when the function hangs.
            signal.alarm(settings["alarm"])
            with Outcome() as call:
                value = plain(function(item["row"], item["response"]))
            answer({"value": value} if call.error is None else call.failure(settings["path"]))
        signal.alarm(0)


if __name__ == "__main__":
    main()
