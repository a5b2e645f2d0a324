"""Where the time of reinforcement learning goes, from the driver's clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.pages.report.curves import RL, Measured

BARS = 40
"""Most of a stage; each is the mean of neighbouring updates."""
METRICS = (
    "seconds_update_total",
    "seconds_sampling",
    "seconds_waiting",
    "seconds_updating",
    "seconds_publishing",
    "seconds_heldout",
    "worker_seconds",
    "worker_seconds_verifying",
    "idle_workers",
)


@dataclass(frozen=True, kw_only=True)
class TimeSpent:
    """A stage: ``TimeSpent(stage="improve", updates=[2.0, 4.0], parts={"sampling": [1.1, 1.0], ...}, totals=
    {"sampling": 4.2, ...}, workers_idle=0.2)``."""

    stage: str
    updates: Sequence[float]
    """The last update of each bar."""
    parts: Mapping[str, Sequence[float]]
    """Mean seconds of an update, bar by bar. ``idle``: an asynchronous learner waits for rollouts; ``other``: what is
    not measured by itself."""
    totals: Mapping[str, float]
    """Seconds of all updates."""
    workers_idle: float | None
    """Mean share of the time in which rollout workers had nothing to sample."""


def time_spent(run: Measured) -> list[TimeSpent]:
    """Each stage of reinforcement learning that has begun."""
    return [_of_stage(run, stage, shown) for stage, shown in RL.items() if len(run.series(stage, METRICS[0])[0])]


def _of_stage(run: Measured, stage: str, shown: str) -> TimeSpent:
    steps, total = run.series(stage, METRICS[0])

    def aligned(metric: str) -> np.ndarray:
        x, y = run.series(stage, metric)
        found = np.zeros(len(steps))
        there = np.isin(x, steps)
        found[np.searchsorted(steps, x[there])] = y[there]
        return found

    waiting, worker = aligned("seconds_sampling"), aligned("worker_seconds")
    # Workers verify what they sampled, so their split is that of the driver's wait for them.
    share = np.divide(aligned("worker_seconds_verifying"), worker, out=np.zeros(len(steps)), where=worker > 0)
    parts = {
        "sampling": waiting * (1 - share),
        "verifying": waiting * share,
        "updating": aligned("seconds_updating"),
        "publishing": aligned("seconds_publishing"),
        "idle": aligned("seconds_waiting"),
    }
    parts["other"] = np.maximum(0.0, total - sum(parts.values()))
    parts["held-out evaluation"] = aligned("seconds_heldout")
    bars = np.array_split(np.arange(len(steps)), min(BARS, len(steps)))
    idle = run.series(stage, "idle_workers")[1]
    return TimeSpent(
        stage=shown,
        updates=[float(steps[bar[-1]]) for bar in bars],
        parts={name: [float(values[bar].mean()) for bar in bars] for name, values in parts.items()},
        totals={name: float(values.sum()) for name, values in parts.items()},
        workers_idle=float(idle.mean()) if len(idle) else None,
    )
