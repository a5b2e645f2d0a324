"""How many rollout workers a run should have: what was asked for from outside, else what the idle shares say. No Ray,
no clock."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from configs.schema import Autoscale
from pipeline.runs.layout import CONTROL
from pipeline.storage.atomic import write_atomic


def write_request(run_dir: Path, workers: int | None) -> None:
    """Ask a run for so many rollout workers; ``None``: as many as it thinks right."""
    write_atomic(run_dir / CONTROL, json.dumps({"rollout_workers": workers}).encode())


def read_request(run_dir: Path) -> int | None:
    """The rollout workers asked for, if any.

    Raises:
        ValueError: somebody wrote the file by hand, and wrong.
    """
    path = run_dir / CONTROL
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); write it with latent-control scale") from error
    workers = content.get("rollout_workers") if isinstance(content, Mapping) else 0
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ValueError(
            f'{path} holds {content!r}; expected e.g. {{"rollout_workers": 3}}: write it with latent-control scale'
        )
    return workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a run wants: ``Demand(workers=2, streak=1)`` has two workers and heard "one more" once."""

    workers: int
    streak: int = 0
    """Updates in a row that said "more" (positive) or "fewer" (negative)."""


def next_demand(demand: Demand, idle_learner: float, idle_workers: float, settings: Autoscale) -> Demand:
    """One step of autoscaling after an update with these idle shares: at most one worker more or fewer, after
    ``patience`` updates.

    Both sides idle at once (stragglers) says nothing. That one step up cannot cause one down, nor the other way round,
    is what ``configs.checks`` asks of the two thresholds.
    """
    more, fewer = idle_learner > settings.learner_idle, idle_workers > settings.workers_idle
    way = (more and demand.workers < settings.max) - (fewer and demand.workers > settings.min) if more != fewer else 0
    streak = way + (demand.streak if way * demand.streak > 0 else 0)
    if abs(streak) < settings.patience:
        return replace(demand, streak=streak)
    return Demand(workers=demand.workers + way)
