"""Reads the contents of a run folder for its report; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.loading import load_config
from configs.schema import RunConfig
from pipeline.evaluation.outcome_file import read_outcomes
from pipeline.evaluation.outcomes import Outcome
from pipeline.runs.events import read_events
from pipeline.runs.layout import CONFIG, ENVIRONMENT, METRICS, OUTCOMES, SUMMARY, stage_record
from pipeline.runs.manifest import read_json
from pipeline.runs.metrics_log import records
from pipeline.runs.status import overview
from pipeline.tracking.uris import read_record


@dataclass(frozen=True, kw_only=True)
class Sources:
    """A run, finished or not. Missing parts are empty."""

    run_dir: Path
    config: RunConfig
    status: str
    """As ``latent-control runs`` says it."""
    summary: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    """Records of the finished ones: ``seconds``, ``checkpoint``, ``metrics``, ``driver_peak_gib``."""
    metrics: Sequence[Mapping[str, Any]]
    outcomes: Sequence[Outcome]
    environment: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    tracked: Mapping[str, Any]

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """Of the last stage."""
        return self.summary.get("evaluation") or {}

    @property
    def variants(self) -> dict[str, Mapping[str, Any]]:
        """The evaluated models and their numbers, in the order of the stages."""
        return variants_of(self.evaluation)

    def series(self, stage: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values [U] of the lines of a stage that have a metric."""
        found = [r for r in self.metrics if r.get("stage") == stage and r.get(metric) is not None]
        return np.array([float(r["step"]) for r in found]), np.array([float(r[metric]) for r in found])


def variants_of(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The models of an evaluation and their numbers."""
    return {name: row for name, row in evaluation.items() if isinstance(row, dict) and "greedy" in row}


def read_sources(run_dir: Path) -> Sources:
    """A run folder.

    Raises:
        ValueError: its config or one of its files is damaged; the message says which.
    """
    config = load_config(run_dir / CONFIG, [], check_paths=False)
    summary = read_json(run_dir / SUMMARY)
    outcomes = read_outcomes(run_dir / OUTCOMES) if (run_dir / OUTCOMES).is_file() else []
    return Sources(
        run_dir=run_dir,
        config=config,
        status=overview(run_dir).status,
        summary=summary,
        stages={
            name: record | read_json(run_dir / stage_record(name)) for name, record in summary.get("stages", {}).items()
        },
        metrics=records(run_dir / METRICS),
        outcomes=outcomes,
        environment=read_json(run_dir / ENVIRONMENT),
        events=read_events(run_dir),
        tracked=read_record(run_dir) or {},
    )
