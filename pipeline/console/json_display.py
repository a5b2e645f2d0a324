"""The output of ``--json``: one JSON object per line, and nothing else on stdout.

    {"event": "start", "time": 1.8e9, "run_dir": "...", "stages": {"actions": 600, ...}, "version": "0.1.0"}
    {"event": "stage_start", "stage": "improve", "updates": 150, "done": 0, "time": ...}
    {"event": "step", "stage": "improve", "step": 42, "time": ..., "reward": 0.5, ...}  # all metrics of metrics.jsonl
    {"event": "message", "text": "...", "kind": "worker_lost", "time": ...}  # kind: "" unless it is a warning
    {"event": "stage_end", "stage": "improve", "seconds": 45.2, "kept": false, "checkpoint": "...", "metrics": {...}}
    {"event": "evaluation", "result": {...}, "time": ...}  # as in summary.json
    {"event": "end", "exit_code": 0, "errors": [], "run_dir": "...", "gates": null, "time": ...}

The last line is always ``end``, also when the config is wrong (exit code 2) and when the run was interrupted.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import IO, Any

from pipeline.console.displays import Display, Writer
from pipeline.console.progress import Ahead


class JsonLines(Display):
    """Writes every event as a line of JSON; numbers that are not finite become null."""

    def __init__(self, file: IO[str]) -> None:
        self._writer = Writer(file)
        self._began: dict[str, float] = {}
        self._at: dict[str, Any] = {}
        """The run, its stage and update, on every line from where they are known."""

    def emit(self, event: str, **facts: Any) -> None:
        """One line."""
        record = {"event": event, "time": round(time.time(), 3)} | self._at | facts
        self._writer.line(json.dumps(_finite(record), default=str))

    def begin(self, ahead: Ahead) -> None:
        self._at = {"run": ahead.run_dir.name}
        self.emit("start", run_dir=str(ahead.run_dir), stages=dict(ahead.stages), version=own_version())

    def stage_begins(self, name: str, total: int, earlier: Sequence[tuple[int, Mapping[str, float]]] = ()) -> None:
        """``stage_start``; ``done``: updates done before a restart."""
        self._began[name] = time.monotonic()
        done = earlier[-1][0] if earlier else 0
        self._at |= {"stage": name, "update": done}
        self.emit("stage_start", updates=total, done=done)

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._at |= {"stage": stage, "update": step}
        self.emit("step", step=step, **metrics)

    def stage_ends(self, name: str, *, kept: bool = False, **facts: Any) -> None:
        seconds = time.monotonic() - self._began[name] if name in self._began else 0.0
        self._at = {name: value for name, value in self._at.items() if name == "run"}
        self.emit("stage_end", stage=name, kept=kept, **{"seconds": round(seconds, 3)} | facts)

    def message(self, text: str, kind: str = "") -> None:
        self.emit("message", text=text, kind=kind)

    def evaluation(self, result: Mapping[str, Any]) -> None:
        self.emit("evaluation", result=result)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def own_version() -> str:
    """Version of the installed program; ``unknown`` where it is only on the path."""
    try:
        return version("latent-control")
    except PackageNotFoundError:
        return "unknown"


@contextmanager
def stdout_alone() -> Iterator[IO[str]]:
    """Yields the real stdout; other output to it in the meantime, that of C code included, goes to stderr."""
    sys.stdout.flush()
    try:
        number = sys.stdout.fileno()
    except OSError:  # io.UnsupportedOperation: no file, so no C code writes there
        with_file, number = sys.stdout, -1
    else:
        with_file = os.fdopen(os.dup(number), "w", encoding="utf-8")
    try:
        if number >= 0:
            os.dup2(sys.stderr.fileno(), number)
        with redirect_stdout(sys.stderr):
            yield with_file
    finally:
        if number >= 0:
            os.dup2(with_file.fileno(), number)
            with_file.close()
