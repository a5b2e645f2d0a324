"""Learning curves with their intervals, out of ``metrics.jsonl``."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from configs.schema import RunConfig
from pipeline.evaluation.statistics import student, success_interval
from pipeline.pages.records import Curve, Figure
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
    ("rollouts_code_perplexity", "code perplexity of an update's rollouts"),
    ("tied_groups", "share of groups whose rewards are all equal, which teach nothing"),
    ("tokens_per_rollout", "tokens of a response"),
    ("staleness_mean", "staleness, updates"),
)


METRICS = ("reward", "success", "loss", *(metric for metric, _ in (*HELDOUT, *BESIDE)))
"""All that the curves are drawn from."""


class Measured(Protocol):
    """A run with its metrics: one that was read (``Sources``), or one that is followed."""

    @property
    def config(self) -> RunConfig:
        """Resolved."""
        ...

    def series(self, stage: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values [U] of the updates that logged a finite one."""
        ...


def half_width(updates: int) -> int:
    """Updates to each side of a window's middle: ``half_width(150)`` is 5, a window of 11."""
    return max(NARROWEST, round(updates / WINDOWS)) // 2


def band(values: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moving mean [U] of ``values`` [U] with Student's 95 % interval, over the up to 2 ``half`` + 1 updates around
    each.

    At the ends the window is cut. Where it holds one value alone there is no interval (NaN).
    """
    at, middle = np.arange(len(values)), values.mean()
    first, last = np.maximum(0, at - half), np.minimum(len(values), at + half + 1)
    count = last - first
    sums, squares = (np.concatenate([[0.0], np.cumsum((values - middle) ** power)]) for power in (1, 2))
    total = sums[last] - sums[first]
    mean = middle + total / count
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.maximum(0.0, squares[last] - squares[first] - total**2 / count) / (count - 1)
        quantiles = np.array([math.nan, *(student(n) for n in range(1, 2 * half + 1))])
        reach = quantiles[count - 1] * np.sqrt(variance / count)
    return mean, mean - reach, mean + reach


def smoothed(name: str, x: np.ndarray, y: np.ndarray, *, share: bool = False) -> Curve:
    """A metric of every update as a curve with its band; ``share``: it lies between 0 and 1, so does the band."""
    half = half_width(len(y))
    mean, low, high = band(y, half)
    if share:
        low, high = low.clip(0, 1), high.clip(0, 1)
    kept = _spread(len(x))
    x, y, mean, low, high = (a[kept] for a in (x, y, mean, low, high))
    raw = tuple(zip(x.tolist(), y.tolist(), strict=True))
    name = f"{name}, mean of {2 * half + 1} updates"
    return Curve(name=name, x=x.tolist(), y=mean.tolist(), low=low.tolist(), high=high.tolist(), raw=raw)


def plain(name: str, x: np.ndarray, y: np.ndarray) -> Curve:
    """A metric as it was logged."""
    kept = _spread(len(x))
    return Curve(name=name, x=x[kept].tolist(), y=y[kept].tolist())


def _spread(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(POINTS, count)).round().astype(int))


def learning_curves(run: Measured) -> list[Figure]:
    """Reward and success of reinforcement learning, held-out plays, what else tells of its health; then the offline
    stages' losses."""
    figures = [
        f
        for metric, title in (("reward", "Reward of training rollouts"), ("success", "Success of training rollouts"))
        for f in _rl(run, metric, title)
    ]
    figures += _heldout(run)
    figures += [f for metric, title in BESIDE for f in _rl(run, metric, title[0].upper() + title[1:])]
    return figures + _offline(run)


def _rl(run: Measured, metric: str, title: str) -> list[Figure]:
    found = {stage: series for stage in RL if len((series := run.series(stage, metric))[0]) > 1}
    flat = all(y.max() == y.min() for _, y in found.values())
    if not found or (flat and metric not in ("reward", "success")):
        return []  # a constant (staleness of synchronous training) is no curve
    share = metric == "success"
    curves = [smoothed(RL[stage], x, y, share=share) for stage, (x, y) in found.items()]
    widths = " and ".join(str(2 * half_width(len(x)) + 1) for x, _ in found.values())
    note = (
        f"Line: mean of {widths} neighbouring updates; band: its 95 % interval (Student's t over these updates); "
        "points: single updates"
    )
    return [Figure(name=metric.replace("_", "-"), title=title, across="update", curves=curves, note=note)]


def _heldout(run: Measured) -> list[Figure]:
    improve = run.config.improve
    curves = []
    for stage, shown in RL.items():
        for metric, mode in HELDOUT:
            x, y = run.series(stage, metric)
            if improve is None or not len(x):
                continue
            prompts, rates = improve.evaluate_prompts, y.tolist()
            low, high = zip(*(success_interval(round(rate * prompts), prompts) for rate in rates), strict=True)
            curves.append(Curve(name=f"{shown}, {mode}", x=x.tolist(), y=rates, low=low, high=high, kind="marks"))
    if not curves or improve is None:
        return []
    note = f"Each mark: {improve.evaluate_prompts} held-out prompts, one rollout each; whiskers: 95 % interval"
    title = "Success on held-out prompts while training"
    return [Figure(name="heldout", title=title, across="update", curves=curves, note=note)]


def _offline(run: Measured) -> list[Figure]:
    figures = []
    for stage, shown in OFFLINE.items():
        x, y = run.series(stage, "loss")
        if len(x) < 2:
            continue
        note = f"Line: mean of {2 * half_width(len(x)) + 1} neighbouring updates; band: its 95 % interval"
        name, title, curve = f"loss-{stage.replace('_', '-')}", f"Loss of stage {shown}", smoothed("loss", x, y)
        figures.append(Figure(name=name, title=title, across="update", curves=[curve], note=note))
    return figures
