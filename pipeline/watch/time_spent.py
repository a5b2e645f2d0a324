"""Where the time of reinforcement learning goes, from the driver's clock."""

from __future__ import annotations

import numpy as np

from pipeline.console.progress import clock
from pipeline.pages.records import Curve, Figure, ReportSection, Table
from pipeline.pages.report.curves import RL, Measured

NOTE = (
    "By the driver's clock, each bar the mean of neighbouring updates. idle: an asynchronous learner waits for "
    "rollouts; other: what is not measured by itself"
)
BARS = 40
"""Most of a stage; each is the mean of neighbouring updates."""
CLOCK = [f"seconds_{what}" for what in ("update_total", "sampling", "waiting", "updating", "publishing", "heldout")]
METRICS = (*CLOCK, "worker_seconds", "worker_seconds_verifying", "idle_workers")


def time_spent(run: Measured) -> list[ReportSection]:
    """Each stage of reinforcement learning that has begun: mean seconds of an update, bar by bar, and of all."""
    return [_of_stage(run, stage, shown) for stage, shown in RL.items() if len(run.series(stage, METRICS[0])[0])]


def _of_stage(run: Measured, stage: str, shown: str) -> ReportSection:
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
    curves = [
        Curve(name=name, x=range(len(bars)), y=[float(values[bar].mean()) for bar in bars], kind="bars")
        for name, values in parts.items()
    ]
    figure = Figure(
        name="time",
        title=f"Seconds of an update: {shown}",
        across="update",
        curves=curves,
        note=NOTE,
        labels=[f"{steps[bar[-1]]:.0f}" for bar in bars],
        stacked=True,
    )
    whole = sum(float(values.sum()) for values in parts.values()) or 1.0
    rows = [[name, f"{values.sum():.1f}", f"{values.sum() / whole:.1%}"] for name, values in parts.items()]
    table = Table(title=f"All updates: {shown}", head=("part", "seconds", "share"), rows=rows)
    lines = [f"Its updates took {clock(whole)} by the driver's clock; starting Ray and loading models is not in it."]
    lines += [f"Rollout workers had nothing to sample {idle.mean():.0%} of the time."] if len(idle) else []
    return ReportSection(name=stage, title=f"Time of stage {shown}", lines=lines, figures=[figure], tables=[table])
