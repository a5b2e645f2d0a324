"""Input and result of every stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from pipeline.runs.layout import CHECKPOINTS
from pipeline.runs.metrics_log import RunLog
from rollout_workers.tasks import Task


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """The run a stage belongs to."""

    config: RunConfig
    run_dir: Path
    log: RunLog
    task: Task
    workers: Any = None
    """Rollout workers that the run shares with others (``pipeline.rl.shared_pool.Share``); ``None``: its own."""

    @property
    def checkpoints(self) -> Path:
        """Where stages leave their results (``<stage>``) and their intermediate states (``<stage>-<update>``)."""
        return self.run_dir / CHECKPOINTS

    def result(self, stage: str) -> Path:
        """The folder of a stage's final checkpoint."""
        return self.checkpoints / stage


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage."""

    checkpoint: Path
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class LastMetrics:
    """Keeps the newest value of every metric a stage logs, for its summary."""

    values: dict[str, Any] = field(default_factory=dict)

    def __call__(self, metrics: dict[str, float]) -> None:
        self.values |= metrics
