"""Prometheus metrics of every process of a run, through Ray, which exports them on each node (docs/observe.md).

Ray puts ``ray_`` before the names. Where no Ray runs nothing is exported, and recording costs microseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

PREFIX = "latent_control_"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds of a histogram's buckets."""


class Metric(NamedTuple):
    """``Metric("Gauge", "mean reward of the update", ("run", "stage"))``."""

    kind: str
    """The class of ``ray.util.metrics``"""
    text: str
    tags: tuple[str, ...]


STEP = ("run", "stage")
_STEPS = {
    # The driver's: each step of metrics.jsonl under its name there (docs/metrics.md has the formulas).
    "loss": "loss of the offline stage",
    "reward": "mean reward of the update's rollouts",
    "success": "share of the update's rollouts that the verifier called right",
    "tied_groups": "share of groups whose rewards are all equal",
    "failures": "rollouts of the update whose verifier failed",
    "tokens": "generated tokens of the update",
    "staleness_mean": "updates between choosing an action and learning from it, mean",
    "staleness_max": "updates between choosing an action and learning from it, largest",
    "idle_workers": "share of the time in which rollout workers waited",
    "rollout_workers": "rollout workers alive",
    "worker_deaths": "deaths of rollout workers so far",
    "worker_gib": "memory of the largest rollout worker, GiB",
    "driver_gib": "memory of the driver, GiB",
    "seconds_update_total": "seconds of the whole update",
    # The learner's, which the driver gets with each update.
    "idle_learner": "share of the time in which the learner waited",
    "seconds_updating": "seconds of the learner's part of the update",
    "logp_gap": "mean difference of the code's log-probability between learner and worker",
    "rescored_gap": "mean difference of the stored log-probability from one recomputed",
    "entropy": "entropy of the policy, nats",
    "updates_skipped": "updates skipped so far because their numbers were broken",
}
METRICS: dict[str, Metric] = {
    "update": Metric("Gauge", "step of the stage that was logged last", STEP),
    **{name: Metric("Gauge", text, STEP) for name, text in _STEPS.items()},
    "events_total": Metric("Counter", "events of the run, as in events.jsonl", ("run", "kind")),
    "tracking_waiting": Metric("Gauge", "records that wait for the tracking store", ()),
    "worker_rollouts_total": Metric("Counter", "rollouts sampled", ("worker",)),
    "worker_tokens_total": Metric("Counter", "tokens sampled", ("worker",)),
    "worker_request_seconds": Metric("Histogram", "seconds of a request for rollouts", ("worker",)),
    "replay_rows_total": Metric("Counter", "rollouts taken into the replay buffer", ("run",)),
    "server_requests_total": Metric("Counter", "HTTP requests by status", ("model", "status")),
    "server_request_seconds": Metric("Histogram", "seconds of a request, a stream's up to its start", ("model",)),
    "server_tokens_total": Metric("Counter", "tokens answered", ("model",)),
}


@cache
def _made(name: str) -> Any:
    from ray.util import metrics

    kind, text, tags = METRICS[name]
    more = {"boundaries": list(SECONDS)} if kind == "Histogram" else {}
    return getattr(metrics, kind)(PREFIX + name, description=text, tag_keys=tags, **more)


def _record(name: str, how: str, value: float, tags: Mapping[str, str]) -> None:
    if "ray" in sys.modules:  # whoever has not loaded it has nobody to export for
        getattr(_made(name), how)(value, tags=dict(tags))


def count(name: str, amount: float = 1.0, **tags: str) -> None:
    """Add to a counter."""
    if amount > 0:  # Ray refuses 0
        _record(name, "inc", amount, tags)


def gauge(name: str, value: float, **tags: str) -> None:
    """Set a gauge."""
    _record(name, "set", value, tags)


def seconds(name: str, value: float, **tags: str) -> None:
    """Enter a duration into a histogram."""
    _record(name, "observe", max(value, 1e-6), tags)  # Ray refuses 0


def step(run: str, stage: str, number: int, values: Mapping[str, float]) -> None:
    """What a run logs at a step."""
    for name, value in {"update": number, **{name: values[name] for name in _STEPS if name in values}}.items():
        gauge(name, value, run=run, stage=stage)
