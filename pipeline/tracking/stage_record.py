"""Records of a stage in MLflow besides its metrics: inputs, results, and the hashes of both."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from configs.schema import DataSource, RunConfig
from pipeline.runs.context import StageContext, StageResult
from pipeline.runs.layout import CONFIG, MANIFEST
from pipeline.runs.stage_table import EVALUATE, ONLINE, level_of
from pipeline.tracking.lineage import (
    config_hash,
    data_sources,
    path_hash,
    prompts_hash,
    result_tags,
    stage_hash,
    task_source,
)
from pipeline.tracking.mlflow_store import Data
from pipeline.tracking.traces import RolloutTrace, heldout_traces, rollout_traces
from pipeline.tracking.tracker import Tracker
from rollout_workers.tasks import Split, build_task
from rollout_workers.tasks.rewards import reward_hash

DESCRIPTION = "mlflow.note.content"
"""The tag that MLflow shows as a run's description."""


def described(run_dir: Path, *lines: str) -> dict[str, str]:
    """The description of a run: ``lines``, and the commands that lead from MLflow to its pages."""
    folder = shlex.quote(str(run_dir.resolve()))
    ways = f"page of this run: `latent-control watch {folder}`\n\nreport: `latent-control report {folder}`"
    return {DESCRIPTION: "\n\n".join([*lines, ways])}


def stage_tags(config: RunConfig, run_dir: Path, stage: str, source: Path | None = None) -> dict[str, str]:
    """Tags by which runs are grouped and found, known when a stage begins."""
    improve = config.improve if stage in ONLINE else None
    tags = {
        "algorithm": stage if improve is None else improve.algorithm,
        "seed": str(config.seed),
        "task": config.task.name,
        "base": Path(config.base.model).name,
        "level": level_of(config, stage),
        "mode": "" if improve is None else improve.mode,
        "run_dir": str(run_dir.resolve()),
        "reward_hash": reward_hash(config.task, config.reward),
        "config_hash": config_hash(run_dir),
        "source_hash": "" if source is None else stage_hash(source),
    }
    return {name: value for name, value in tags.items() if value} | described(run_dir)


def note_inputs(tracker: Tracker, context: StageContext, stage: str) -> None:
    """Record the data that a stage reads, with digests, and the config."""
    tracker.artifact(context.run_dir / CONFIG)
    config = context.config
    if stage in ONLINE:
        tracker.dataset(_prompts(context, "train", "training"))
        if config.improve is not None and config.improve.evaluate_every is not None:
            tracker.dataset(_prompts(context, "heldout", "evaluation"))
    elif stage == EVALUATE:
        tracker.dataset(_prompts(context, "heldout", "evaluation"))
    for source in data_sources(config, stage):
        tracker.dataset(_source(context, source))


def note_result(tracker: Tracker, context: StageContext, result: StageResult, source: Path | None) -> None:
    """Record hashes of a stage's result and source as tags; the checkpoint's manifest, or all of it, as artifacts."""
    folder = result.checkpoint
    tracker.tag(result_tags(context.run_dir, folder, source))
    whole = context.config.tracking.checkpoints == "files"
    tracker.artifact(folder if whole else folder / MANIFEST, "checkpoint")


def _prompts(context: StageContext, split: Split, purpose: str) -> Data:
    # Now, not in the tracker's thread: a task's generator may not be thread-safe.
    digest = prompts_hash(context.task, split, context.config.task.options)
    name = f"{context.config.task.name}/{split}"
    return Data(name=name, digest=lambda: digest, kind="code", source=task_source(context.config), context=purpose)


def _source(context: StageContext, source: DataSource) -> Data:
    if source.kind == "task":
        config = source.task or context.config.task
        task = context.task if source.task is None else build_task(source.task)
        digest = prompts_hash(task, "train", config.options)
        about = json.dumps({"task": config.name, "options": config.options}, default=str)
        return Data(name=f"{config.name}/train demonstrations", digest=lambda: digest, kind="code", source=about)
    path = Path(str(source.path))
    about = json.dumps({"uri": path.resolve().as_uri()})
    return Data(name=f"{source.kind} {path.name}", digest=partial(path_hash, path), kind="local", source=about)


def traces_of(config: RunConfig, run_dir: Path, stage: str) -> Callable[[], list[RolloutTrace]] | None:
    """What reads the rollouts of a stage that are stored as traces; ``None`` for a stage without."""
    most = config.tracking.traces
    if not most or stage not in (*ONLINE, EVALUATE):
        return None
    if stage == EVALUATE:
        return partial(heldout_traces, run_dir, most)
    return partial(rollout_traces, run_dir, level_of(config, stage), most)


@contextmanager
def tracking(context: StageContext, tracker: Tracker, stage: str, source: Path | None = None) -> Iterator[None]:
    """An MLflow run around a block, honest about how it ended."""
    config = context.config
    tracker.start(stage, params=config.model_dump(mode="json"), tags=stage_tags(config, context.run_dir, stage, source))
    if config.tracking.enabled:
        note_inputs(tracker, context, stage)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status, traces=traces_of(config, context.run_dir, stage) if status == "FINISHED" else None)
