"""The stages that a config names, each with the function that runs it, and what each starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from configs.schema import RunConfig
from pipeline.runs import interrupts
from pipeline.runs.context import StageContext, StageResult
from pipeline.runs.layout import stage_record
from pipeline.runs.stage_table import BASE, Stage, level_of, planned
from pipeline.stages.base_model import resolve_base


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A stage of a run: how it is run, given the checkpoint of the stage before."""

    name: str
    settings: Any
    work: Callable[[StageContext, Path | None], StageResult]
    passes_on: bool = True
    """Whether the next stage starts from this one's result."""


def plan(config: RunConfig) -> list[Planned]:
    """The stages of ``config`` in order."""
    return [
        Planned(
            name=stage.name,
            settings=stage.settings(config),
            work=train_base_stage if stage.name == BASE else partial(_online if stage.online else _offline, stage),
            passes_on=stage.passes_on,
        )
        for stage in planned(config)
    ]


def sources_of(config: RunConfig, run_dir: Path) -> dict[str, Path]:
    """What each stage whose forerunners are done starts from: the checkpoint of the one before that passes its result
    on."""
    sources: dict[str, Path] = {}
    source: Path | None = None
    for stage in planned(config):
        if source is not None:
            sources[stage.name] = source
        record = run_dir / stage_record(stage.name)
        if record.is_file() and stage.passes_on:
            source = (run_dir / json.loads(record.read_text())["checkpoint"]).resolve()
    return sources


def _offline(stage: Stage, context: StageContext, source: Path | None) -> StageResult:
    from pipeline.stages.offline import run_offline

    config = context.config
    return run_offline(context, stage.name, stage.settings(config), source, resolve_base(config))


def _online(stage: Stage, context: StageContext, source: Path | None) -> StageResult:
    from pipeline.stages.improve import run_improve

    if source is None:
        raise ValueError(
            "the improve stage needs latent actions: add the actions section, "
            "or set actions.init to a checkpoint with actions.updates=0"
        )
    return run_improve(context, stage.name, source, level_of(context.config, stage.name))


def train_base_stage(context: StageContext, _: Path | None) -> StageResult:
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
