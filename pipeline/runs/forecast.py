"""Expected seconds of each stage, from the newest run with the same settings in the same folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.loading import load_config
from configs.schema import RunConfig
from pipeline.runs.events import read_events
from pipeline.runs.layout import CONFIG, SUMMARY
from pipeline.runs.stage_table import EVALUATE, PAGES, STAGES
from pipeline.runs.summary import read_summary

NEIGHBOURS = 5
"""Newest runs in the same folder that are searched."""
SECTIONS = {stage.name: stage.section.partition(".")[0] for stage in STAGES} | {
    EVALUATE: "evaluation",
    PAGES: "explorer",
}
"""Section of the config that each stage's time depends on."""
EVERYWHERE = ("base", "task", "reward", "rollout", "cluster")
"""What may make any stage slower."""


def expected_seconds(run_dir: Path, config: RunConfig) -> dict[str, float]:
    """Seconds of each stage that a run beside ``run_dir`` with the same section did in one go; newer runs win."""
    found: dict[str, float] = {}
    for folder in _neighbours(run_dir):
        try:
            other = load_config(folder / CONFIG, check_paths=False)
            took = _took(read_summary(folder))
        except (ValueError, OSError, RecursionError):
            continue  # what is damaged tells nothing
        if any(getattr(other, section) != getattr(config, section) for section in EVERYWHERE):
            continue
        if sum(event["kind"] == "started" for event in read_events(folder)) != 1:
            continue  # a resumed stage took longer than was noted
        for stage, seconds in took.items():
            section = SECTIONS.get(stage)
            if section is None or getattr(other, section) == getattr(config, section):
                found.setdefault(stage, seconds)
    return found


def _neighbours(run_dir: Path) -> list[Path]:
    """The newest run folders with a summary beside ``run_dir``."""
    if not run_dir.parent.is_dir():
        return []
    others = [
        path
        for path in run_dir.parent.iterdir()
        if path != run_dir and (path / SUMMARY).is_file() and (path / CONFIG).is_file()
    ]
    return sorted(others, key=lambda path: (path / SUMMARY).stat().st_mtime, reverse=True)[:NEIGHBOURS]


def _took(summary: Mapping[str, Any]) -> dict[str, float]:
    stages = {name: float(stage["seconds"]) for name, stage in summary.get("stages", {}).items()}
    return stages | {name: float(seconds) for name, seconds in summary.get("took", {}).items()}
