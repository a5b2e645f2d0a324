"""Status, progress and result of the runs in a folder, read without opening a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.loading import load_config
from configs.schema import RunConfig
from pipeline.console.progress import clock
from pipeline.evaluation.gates import final_of
from pipeline.runs.layout import CONFIG, METRICS, SUMMARY
from pipeline.runs.manifest import read_json
from pipeline.runs.metrics_log import records
from pipeline.runs.process import is_alive, read_process
from pipeline.runs.stage_table import planned, settings_of


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A run at a glance. ``Overview(folder=Path("runs/first"), status="running", stage="improve", step=40, total=150,
    ...)``."""

    folder: Path
    status: str
    """"finished", "running", "interrupted" or "unreadable: <why>"."""
    stage: str = ""
    """The last one that logged something."""
    step: int = 0
    total: int = 0
    reward: float | None = None
    """Of the last update of reinforcement learning."""
    success: float | None = None
    """Of the last model on held-out prompts, sampled."""
    variant: str = ""
    """Which model that is."""
    seconds: float = 0.0
    """All stages together, as far as they are done."""
    modified: float = 0.0
    """Time of the last log line, seconds since 1970."""


def overview(folder: Path) -> Overview:
    """Status and progress of the run in ``folder``."""
    try:
        config = load_config(folder / CONFIG, check_paths=False)
        summary = read_json(folder / SUMMARY)
        last, reward = _last_lines(folder / METRICS)
    except (ValueError, OSError) as error:
        return Overview(folder=folder, status=f"unreadable: {str(error).splitlines()[0][:80]}")
    evaluation = summary.get("evaluation") or {}
    variant = final_of(evaluation) if evaluation else ""
    stages: Mapping[str, Any] = summary.get("stages", {})
    modified = float(last.get("time", (folder / CONFIG).stat().st_mtime))
    return Overview(
        folder=folder,
        status=status_of(folder, config, summary, modified),
        stage=str(last.get("stage", "")),
        step=int(last.get("step", 0)),
        total=_total(config, str(last.get("stage", ""))),
        reward=reward,
        success=evaluation[variant]["sampled"] if variant else None,
        variant=variant,
        seconds=float(sum(stage["seconds"] for stage in stages.values())),
        modified=modified,
    )


def finished(config: RunConfig, summary: Mapping[str, Any]) -> bool:
    """Whether a run has all its stages and its evaluation."""
    done = summary.get("stages", {}).keys()
    whole = {stage.name for stage in planned(config, done)} <= done
    return whole and (config.evaluation is None or "evaluation" in summary)


def status_of(folder: Path, config: RunConfig, summary: Mapping[str, Any], modified: float) -> str:
    """ "finished", "running" or "interrupted"; ``modified``: Unix time of the last log line."""
    if finished(config, summary):
        return "finished"
    process = read_process(folder)
    return "running" if process and is_alive(process, modified) else "interrupted"


def _total(config: RunConfig, stage: str) -> int:
    return int(getattr(settings_of(config, stage), "updates", 0))


def _last_lines(path: Path) -> tuple[Mapping[str, Any], float | None]:
    """(the last record, the last reward)."""
    found = records(path)
    rewards = (record["reward"] for record in reversed(found) if "reward" in record)
    return found[-1] if found else {}, next(rewards, None)


def runs_in(folder: Path) -> list[Overview]:
    """Every run directly below ``folder``, the newest first.

    Raises:
        ValueError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; runs are in runs/ unless --run-dir was given")
    found = [overview(path) for path in sorted(folder.iterdir()) if (path / CONFIG).is_file()]
    if not found:
        raise ValueError(f"no run folder (with a {CONFIG}) lies directly in {folder}; give the folder that holds them")
    return sorted(found, key=lambda run: run.modified, reverse=True)


HEAD = ("run", "status", "stage", "updates", "reward", "success", "model", "wall time", "last activity")


def cells(run: Overview, now: float) -> list[str]:
    """One line of the table under ``HEAD``."""
    return [
        run.folder.name,
        run.status,
        run.stage,
        f"{run.step}/{run.total}" if run.total else "",
        "" if run.reward is None else f"{run.reward:.3f}",
        "" if run.success is None else f"{run.success:.3f}",
        run.variant,
        clock(run.seconds) if run.seconds else "",
        f"{clock(max(0.0, now - run.modified))} ago" if run.modified else "",
    ]
