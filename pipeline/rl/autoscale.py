"""How many rollout workers a run should have: what was asked for from outside, else what the idle shares say. No Ray,
no clock."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.schema import Autoscale


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
