"""The learning rate over a stage's updates, one formula for every stage."""

from __future__ import annotations

import math
from typing import Protocol


class Scheduled(Protocol):
    """The settings a schedule is made of."""

    @property
    def updates(self) -> int: ...
    @property
    def warmup_updates(self) -> int: ...
    @property
    def min_learning_rate_share(self) -> float: ...


def learning_rate_share(settings: Scheduled, update: int) -> float:
    """Linear warm-up, then cosine from 1 to ``min_learning_rate_share``; of ``update`` = 0, 1, ... alone, so resume
    needs no state."""
    warmup = min(1.0, (update + 1) / max(1, settings.warmup_updates))
    progress = min(
        1.0, max(0.0, (update - settings.warmup_updates) / max(1, settings.updates - settings.warmup_updates))
    )
    floor = settings.min_learning_rate_share
    return warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
