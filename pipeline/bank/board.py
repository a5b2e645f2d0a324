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
    """Lines about all runs at most every ``EVERY`` seconds: ``board.look(at_work=8, ended=1)``."""

    def __init__(self, displays: Sequence[MemberDisplay], say: Say) -> None:
        self.displays, self.say = displays, say
        self.began = self._shown = time.monotonic()
        self._tokens = 0.0

    @property
    def steps(self) -> int:
        """Updates of all runs so far."""
        return sum(stage.step for display in self.displays if (stage := display.stage) is not None)

    def look(self, at_work: int, ended: int) -> None:
        """Show how all are doing, if it is time."""
        now = time.monotonic()
        if now - self._shown < EVERY:
            return
        tokens = sum(display.tokens for display in self.displays)
        speed, self._tokens = (tokens - self._tokens) / (now - self._shown), tokens
        self._shown = now
        self.say(f"{time.strftime('%H:%M:%S')} {at_work} at work, {ended} ended  {speed:.0f} tok/s{self._left(now)}")
        for line in self._cells():
            self.say(line)

    def _left(self, now: float) -> str:
        """The time left, if all go on as fast as they did."""
        stages = [stage for display in self.displays if (stage := display.stage) is not None and stage.total]
        done, whole = sum(stage.step for stage in stages), sum(stage.total for stage in stages)
        return f"  ETA {clock((now - self.began) * (whole - done) / done)}" if done else ""

    def _cells(self) -> Iterator[str]:
        cells = []
        for display in self.displays:
            stage = display.stage
            if stage is None or not stage.step:
                continue
            reward = f" {number(stage.metrics['reward'])}" if "reward" in stage.metrics else ""
            cells.append(f"{display.name[:12]} {stage.step}/{stage.total}{reward}".ljust(_CELL))
        each = COLUMNS // _CELL
        for first in range(0, len(cells), each):
            yield "  " + "".join(cells[first : first + each]).rstrip()
