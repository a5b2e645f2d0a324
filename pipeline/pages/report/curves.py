"""Learning curves with their intervals, out of ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.statistics import student, success_interval
from pipeline.pages.charts.records import Curve, Lines
from pipeline.pages.report.sources import Sources
from pipeline.runs.stage_table import STAGES

POINTS = 300
"""Most of a curve on the page; those left out are spread evenly."""
WINDOWS = 15
"""A window is about this part of all updates, at least ``NARROWEST`` of them."""
NARROWEST = 5
RL = {stage.name: stage.shown or stage.name for stage in reversed(STAGES) if stage.online}
OFFLINE = {stage.name: stage.shown or stage.name for stage in STAGES if not stage.online}
HELDOUT = (("heldout_success", "sampled"), ("heldout_greedy", "greedy"))
BESIDE = (
    ("entropy", "entropy of the policy over the codes, nats"),
    ("kl_to_reference", "KL to the cloned policy, nats"),
    ("tied_groups", "share of groups whose rewards are all equal, which teach nothing"),
    ("tokens_per_rollout", "tokens of a response"),
    ("staleness_mean", "staleness, updates"),
)


def half_width(updates: int) -> int:
    """Updates to each side of a window's middle: ``half_width(150)`` is 5, a window of 11."""
    return max(NARROWEST, round(updates / WINDOWS)) // 2


def band(values: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moving mean [U] of ``values`` [U] with Student's 95 % interval, over the up to 2 ``half`` + 1 updates around
    each.

    At the ends the window is cut. Where it holds one value alone there is no interval (NaN).
    """
    found = np.full((3, len(values)), math.nan)
    for i in range(len(values)):
        window = values[max(0, i - half) : i + half + 1]
        found[0, i] = mean = window.mean()
        if len(window) > 1:
            reach = student(len(window) - 1) * float(window.std(ddof=1)) / math.sqrt(len(window))
            found[1:, i] = mean - reach, mean + reach
    return found[0], found[1], found[2]


def smoothed(name: str, steps: Sequence[Mapping[str, Any]], metric: str, *, share: bool = False) -> Curve:
    """A metric of every update as a curve with its band; ``share``: it lies between 0 and 1, so does the band."""
    x, y = np.array([float(r["step"]) for r in steps]), np.array([float(r[metric]) for r in steps])
    mean, low, high = band(y, half_width(len(y)))
    if share:
        low, high = low.clip(0, 1), high.clip(0, 1)
    kept = np.unique(np.linspace(0, len(x) - 1, min(POINTS, len(x))).round().astype(int))
    x, y, mean, low, high = (a[kept] for a in (x, y, mean, low, high))
    raw = tuple(zip(x.tolist(), y.tolist(), strict=True))
    return Curve(name=name, x=x.tolist(), y=mean.tolist(), low=low.tolist(), high=high.tolist(), raw=raw)


def plain(name: str, steps: Sequence[Mapping[str, Any]], metric: str) -> Curve:
    """A metric as it was logged."""
    kept = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(POINTS, len(steps))).round().astype(int))]
    return Curve(name=name, x=[float(r["step"]) for r in kept], y=[float(r[metric]) for r in kept])


def learning_curves(sources: Sources) -> list[Lines]:
    """Reward and success of reinforcement learning, held-out plays, what else tells of its health; then the offline
    stages' losses."""
    figures = [
        f
        for metric, title in (("reward", "Reward of training rollouts"), ("success", "Success of training rollouts"))
        for f in _rl(sources, metric, title)
    ]
    figures += _heldout(sources)
    figures += [f for metric, title in BESIDE for f in _rl(sources, metric, title[0].upper() + title[1:])]
    return figures + _offline(sources)


def _rl(sources: Sources, metric: str, title: str) -> list[Lines]:
    steps = {stage: sources.steps(stage, metric) for stage in RL}
    share = metric == "success"
    curves = [smoothed(RL[stage], found, metric, share=share) for stage, found in steps.items() if len(found) > 1]
    flat = all(max(curve.y) == min(curve.y) for curve in curves)
    if not curves or (flat and metric not in ("reward", "success")):
        return []  # a constant (staleness of synchronous training) is no curve
    widths = " and ".join(str(2 * half_width(len(found)) + 1) for found in steps.values() if len(found) > 1)
    note = (
        f"Line: mean of {widths} neighbouring updates; band: its 95 % interval (Student's t over these updates); "
        "points: single updates"
    )
    return [Lines(name=metric.replace("_", "-"), title=title, across="update", curves=curves, note=note)]


def _heldout(sources: Sources) -> list[Lines]:
    improve = sources.config.improve
    curves = []
    for stage, shown in RL.items():
        for metric, mode in HELDOUT:
            if improve is None or not (steps := sources.steps(stage, metric)):
                continue
            rates = [float(r[metric]) for r in steps]
            bounds = [
                success_interval(round(rate * improve.evaluate_prompts), improve.evaluate_prompts) for rate in rates
            ]
            low, high = zip(*bounds, strict=True)
            x = [float(r["step"]) for r in steps]
            curves.append(Curve(name=f"{shown}, {mode}", x=x, y=rates, low=low, high=high, joined=False))
    if not curves or improve is None:
        return []
    note = f"Each mark: {improve.evaluate_prompts} held-out prompts, one rollout each; whiskers: 95 % interval"
    return [
        Lines(
            name="heldout",
            title="Success on held-out prompts while training",
            across="update",
            curves=curves,
            note=note,
        )
    ]


def _offline(sources: Sources) -> list[Lines]:
    figures = []
    for stage, shown in OFFLINE.items():
        if len(steps := sources.steps(stage, "loss")) < 2:
            continue
        figures.append(
            Lines(
                name=f"loss-{stage.replace('_', '-')}",
                title=f"Loss of stage {shown}",
                across="update",
                curves=[smoothed("loss", steps, "loss")],
                note=f"Line: mean of {2 * half_width(len(steps)) + 1} neighbouring updates; band: its 95 % interval",
            )
        )
    return figures
