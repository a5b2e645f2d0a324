"""The stages that a config names, the function that runs each, and what each starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

from configs.schema import RunConfig
from pipeline.runs import interrupts, manifest
from pipeline.runs.context import StageContext, StageResult
from pipeline.runs.layout import CHECKPOINTS, STAGE_RECORDS, stage_record
from pipeline.runs.stage_table import BASE, Stage, planned, start_of
from pipeline.stages.base_model import resolve_base

Work = Callable[[StageContext, Stage, Path | None], StageResult]
"""How a stage is run, given the checkpoint that it starts from."""


def plan(config: RunConfig, run_dir: Path) -> list[Stage]:
    """The stages of the run ``config`` in ``run_dir``, begun or not, in order."""
    return planned(config, begun(run_dir))


def work_of(stage: Stage) -> Work:
    """The function that runs a stage."""
    if stage.name == BASE:
        return train_base_stage
    if stage.online:
        from pipeline.stages.improve import run_improve

        return run_improve
    return _offline


def begun(run_dir: Path) -> set[str]:
    """The stages of which a run has a record or a checkpoint, or had: its manifest knows."""
    files = (path.relative_to(run_dir).as_posix() for path in run_dir.glob("*/*"))
    names = [name.split("/") for name in (*manifest.known(run_dir), *files)]
    return {of[1].partition("-")[0].removesuffix(".json") for of in names if of[0] in (STAGE_RECORDS, CHECKPOINTS)}


def sources_of(config: RunConfig, run_dir: Path) -> dict[str, Path]:
    """The checkpoint that each stage whose forerunners are done starts from."""
    records = {stage.name: run_dir / stage_record(stage.name) for stage in planned(config)}
    made = {
        name: (run_dir / json.loads(record.read_text())["checkpoint"]).resolve()
        for name, record in records.items()
        if record.is_file()
    }
    found = {name: start_of(config, name, made) for name in records}
    return {name: source for name, source in found.items() if source is not None}


def _offline(context: StageContext, stage: Stage, source: Path | None) -> StageResult:
    from pipeline.stages.offline import run_offline

    config = context.config
    return run_offline(context, stage.name, stage.settings(config), source, resolve_base(config))


def train_base_stage(context: StageContext, _: Stage, __: Path | None) -> StageResult:
    """Train the small base LM from scratch into ``base.model``."""
    from learners.base_training import WordTask, train_base

    base = context.config.base
    assert base.train is not None
    context.log.begin(BASE, base.train.updates)
    with interrupts.at_once():  # it keeps no checkpoints
        train_base(
            base.train,
            task=cast(WordTask, context.task),
            folder=Path(base.model),
            seed=context.config.seed,
            threads=context.config.cluster.learner_threads,
            log=lambda update, metrics: context.log.log(BASE, update, metrics),
        )
    return StageResult(checkpoint=Path(base.model))
