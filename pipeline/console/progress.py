"""Progress of a run, as numbers and short words, from which every display is made."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

KEY_METRICS = (
    "reward",
    "success",
    "loss",
    "nll_codes",
    "nll",
    "kl",
    "kl_to_reference",
    "staleness_mean",
    "rollouts_code_perplexity",
    "inverse_dynamics_code_perplexity",
    "entropy",
    "agreement",
)
"""Shown first, in this order, where they are logged; matched against the last part of a metric's name."""
CAUTIONS: tuple[tuple[str, float, str], ...] = (
    ("failures", 0.0, "verifiers could not judge some rollouts: latent-control task check"),
    ("updates_skipped", 0.0, "updates were skipped: quarantine/ has their rollouts"),
    ("clip_share", 0.2, "large steps: lower improve.learning_rate"),
    ("logp_gap", 0.05, "worker and learner disagree on log-probabilities"),
    ("importance_capped_share", 0.2, "workers sample otherwise than the learner: lower improve.max_staleness"),
)
"""(metric, bound, warning above the bound); docs/metrics.md has the reasons."""
EVALUATE = "evaluate"
UNITS = {EVALUATE: "models"}
"""The unit of a stage that does not count updates."""
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_RECENT = 20
_TROUBLES = 3


def number(value: float) -> str:
    """A short form of a number: ``0.512``, ``1234``, ``3.1e-05``."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """A short form of a time span: ``42s``, ``5m20s``, ``1h02m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def sparkline(values: Sequence[float], width: int | None = None, *, ascii_only: bool = False) -> str:
    """One character per value, its height between the smallest and the largest; more than ``width`` values are averaged
    in groups."""
    if width is not None and len(values) > width:
        edges = [i * len(values) // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    bars = _PLAIN_BARS if ascii_only else _BARS
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((v - low) * scale)] for v in values)


def by_last_part(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same numbers under the last part of each name; the first of equal names is kept."""
    short: dict[str, float] = {}
    for name, value in metrics.items():
        short.setdefault(name.rsplit("/", 1)[-1], value)
    return short


def key_metrics(metrics: Mapping[str, float], count: int = 5) -> list[tuple[str, float]]:
    """The metrics to show: the best known ones first, then the others in their order; by the last part of their
    names."""
    short = by_last_part(metrics)
    ranked = [name for name in KEY_METRICS if name in short] + [name for name in short if name not in KEY_METRICS]
    return [(name, short[name]) for name in ranked[:count]]


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What is known of a run before it starts.

    ``Ahead(run_dir=Path("runs/first"), stages={"actions": 600, "evaluate": 0}, seconds={"actions": 60.0},
    num_actions=64)``
    """

    run_dir: Path
    stages: Mapping[str, int]
    """Updates of each stage, in order; 0 where it does not count any."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Durations of the stages in an earlier run with the same settings."""
    evaluation_rollouts: float = 0.0
    """Of stage ``evaluate``, whose duration is told from them and the speed of reinforcement learning's."""
    ray_start: float = 0.0
    """Seconds of a stage until Ray and its workers have started."""
    num_actions: int | None = None
    max_staleness: int | None = None
    """The bound on staleness of asynchronous RL; ``None`` when synchronous."""


class StageProgress:
    """Progress of one stage."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.step = name, total, 0
        self.state: Literal["ahead", "current", "done"] = "ahead"
        self.began: float | None = None
        self.took: float | None = None
        """Duration in seconds, once done."""
        self.metrics: dict[str, float] = {}
        """The newest value of each, by the last part of its name."""
        self.curve: list[float] = []
        """Reward of each step; the loss where there is none."""
        # Updates before a restart took no time of this process: its first logged step is where it began.
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)

    def begin(self, total: int) -> None:
        """It starts, now."""
        self.total, self.state, self.began, self.took = total, "current", time.monotonic(), None

    def end(self, kept: bool, seconds: float | None = None) -> None:
        """It is done; ``kept`` if before a restart; ``seconds``: that the run writes down, its preparation included."""
        self.took = None if kept else self.elapsed if seconds is None else seconds
        self.state, self.step = "done", max(self.step, self.total)

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a logged step."""
        self._recent.append((step, time.monotonic()))
        self.remember(step, metrics)

    def remember(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a step from before a restart, which does not count for the speed."""
        short = by_last_part(metrics)
        self.step = step
        self.metrics |= short
        value = short.get("reward", math.nan if "reward" in self.metrics else short.get("loss", math.nan))
        if math.isfinite(value):
            self.curve.append(value)

    @property
    def seconds(self) -> float:
        """Seconds per update, over the last logged steps."""
        if not self._recent:
            return 0.0
        (first, then), (last, now) = self._recent[0], self._recent[-1]
        return (now - then) / (last - first) if last > first else 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens, over the last update; ``None`` where none are generated."""
        tokens, seconds = self.metrics.get("tokens"), self.metrics.get("seconds_update_total")
        return tokens / seconds if tokens is not None and seconds else None

    @property
    def left(self) -> float:
        """Seconds until the stage's last update."""
        return max(0, self.total - self.step) * self.seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began, or since the restart."""
        return self.took if self.took is not None else 0.0 if self.began is None else time.monotonic() - self.began

    @property
    def cautions(self) -> list[str]:
        """Warnings about the newest metrics."""
        found = [(name, self.metrics.get(name, 0.0), bound, word) for name, bound, word in CAUTIONS]
        return [f"{name} {number(value)}: {word}" for name, value, bound, word in found if value > bound]


class RunProgress:
    """Progress of a run: its stages, warnings, and the time left."""

    def __init__(self, ahead: Ahead) -> None:
        self.ahead = ahead
        self.stages = {name: StageProgress(name, total) for name, total in ahead.stages.items()}
        self.current: StageProgress | None = None
        self.troubles: deque[tuple[float, str]] = deque(maxlen=_TROUBLES)
        """(unix time, what happened) of the last warnings."""
        self.codes: tuple[str, float, float] | None = None
        """(who chose them, active codes, code perplexity) as last measured by any stage."""
        self.began = time.monotonic()

    def begin(self, name: str, total: int) -> StageProgress:
        """A stage starts."""
        self.current = self.stages.setdefault(name, StageProgress(name, total))
        self.current.begin(total)
        return self.current

    def of(self, name: str, step: int) -> StageProgress:
        """The stage ``name``; one that was not begun ends at its step."""
        if name not in self.stages:
            self.stages[name] = StageProgress(name, step)
        return self.stages[name]

    def advance(self, name: str, step: int, metrics: Mapping[str, float]) -> StageProgress:
        """A logged step."""
        stage = self.of(name, step)
        stage.advance(step, metrics)
        for whose in ("inverse_dynamics", "rollouts"):
            if f"{whose}_alive_codes" in metrics:
                self.codes = whose, metrics[f"{whose}_alive_codes"], metrics[f"{whose}_code_perplexity"]
        return stage

    def end(self, name: str, *, kept: bool = False, seconds: float | None = None) -> StageProgress:
        """A stage is done (``StageProgress.end``)."""
        stage = self.of(name, 0)
        stage.end(kept, seconds)
        self.current = None if self.current is stage else self.current
        return stage

    @property
    def elapsed(self) -> float:
        """Seconds since this process started the run."""
        return time.monotonic() - self.began

    def left(self) -> tuple[float, list[str]]:
        """(seconds left, as far as known; the stages whose duration is unknown)."""
        seconds, unknown = 0.0, list[str]()
        for stage in self.stages.values():
            if stage.state == "done":
                continue
            expected = self.ahead.seconds.get(stage.name)
            if stage.seconds:
                seconds += stage.left
            elif expected is not None or (expected := self._of_evaluation(stage.name)) is not None:
                seconds += max(0.0, expected - stage.elapsed)
            else:
                unknown.append(stage.name)
        return seconds, unknown

    def _of_evaluation(self, name: str) -> float | None:
        """Seconds of stage ``evaluate`` by the newest update's rollouts; ``None``: another stage, or none yet."""
        if name != EVALUATE or not self.ahead.evaluation_rollouts:
            return None
        for stage in reversed(self.stages.values()):
            if stage.metrics.get("rollouts") and (took := stage.metrics.get("seconds_update_total")):
                return self.ahead.ray_start + self.ahead.evaluation_rollouts * took / stage.metrics["rollouts"]
        return None
