"""What is shown of many runs at work: one line for all, then a few numbers of each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.console.displays import COLUMNS, Display
from pipeline.console.progress import Ahead, RunProgress, StageProgress, clock, number
from pipeline.runs.events import Say

EVERY = 10.0
"""Seconds between two looks at all policies."""
_CELL = 26


class MemberDisplay(Display):
    """The display of one run, which the board reads."""

    def __init__(self, name: str, say: Say) -> None:
        self.name, self.say = name, say
        self.run = RunProgress(Ahead(run_dir=Path(), stages={}))
        self.tokens = 0.0
        """Generated, as far as updates have trained on them."""

    def begin(self, ahead: Ahead) -> None:
        self.run = RunProgress(ahead)

    def stage_begins(self, name: str, total: int, earlier: Sequence[tuple[int, Mapping[str, float]]] = ()) -> None:
        stage = self.run.begin(name, total)
        for step, metrics in earlier:
            stage.remember(step, metrics)

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.run.advance(stage, step, metrics)
        self.tokens += metrics.get("tokens", 0.0)

    def stage_ends(self, name: str, *, kept: bool = False, **facts: Any) -> None:
        self.run.end(name, kept=kept)

    def message(self, text: str, kind: str = "") -> None:
        """The text, with the run's name before it."""
        self.say(f"{self.name}: {text}", kind)

    @property
    def stage(self) -> StageProgress | None:
        """The one at work, or else the last one."""
        return self.run.current or next(reversed(self.run.stages.values()), None)


class Board:
    """Lines about all runs at most every ``EVERY`` seconds: ``board.look(displays, at_work=8)``."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.began = self._shown = time.monotonic()
        self._tokens = 0.0

    @staticmethod
    def steps(displays: Sequence[MemberDisplay]) -> int:
        """Updates of all runs so far."""
        return sum(stage.step for display in displays if (stage := display.stage) is not None)

    def look(self, displays: Sequence[MemberDisplay], *, at_work: int) -> None:
        """Show how all are doing, if it is time."""
        now = time.monotonic()
        if now - self._shown < EVERY:
            return
        tokens = sum(display.tokens for display in displays)
        speed, self._tokens = max(0.0, tokens - self._tokens) / (now - self._shown), tokens
        self._shown, left = now, self._left(displays, now)
        at = time.strftime("%H:%M:%S")
        self.say(f"{at} {at_work} at work, {len(displays) - at_work} ended  {speed:.0f} tok/s{left}")
        for line in _cells(displays):
            self.say(line)

    def _left(self, displays: Sequence[MemberDisplay], now: float) -> str:
        """The time left, if all go on as fast as they did."""
        stages = [stage for display in displays if (stage := display.stage) is not None and stage.total]
        done, whole = sum(stage.step for stage in stages), sum(stage.total for stage in stages)
        return f"  ETA {clock((now - self.began) * (whole - done) / done)}" if done else ""


def _cells(displays: Sequence[MemberDisplay]) -> Iterator[str]:
    """Updates and reward of each run, several in a line."""
    cells = []
    for display in displays:
        stage = display.stage
        if stage is None or not stage.step:
            continue
        reward = f" {number(stage.metrics['reward'])}" if "reward" in stage.metrics else ""
        cells.append(f"{display.name[:12]} {stage.step}/{stage.total}{reward}".ljust(_CELL))
    each = COLUMNS // _CELL
    for first in range(0, len(cells), each):
        yield "  " + "".join(cells[first : first + each]).rstrip()
