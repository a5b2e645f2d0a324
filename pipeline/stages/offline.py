"""Runs an offline stage in the driver's process or on several Ray Train workers."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.schema import Actions, Training
from latent_control.pretrained import load_policy, with_policy
from pipeline.cluster.connect import connected
from pipeline.runs import seals
from pipeline.runs.context import LastMetrics, StageContext, StageResult
from pipeline.stages.offline_job import OfflineJob, passes_on, updates_done
from pipeline.stages.offline_work import work
from pipeline.stages.ray_train import run_workers
from pipeline.storage import checkpoints
from pipeline.tracking.provenance import circumstances


def run_offline(context: StageContext, stage: str, settings: Training, source: Path | None, base: str) -> StageResult:
    """Train one offline stage from ``source``, or from its newest valid checkpoint."""
    if source is None and isinstance(settings, Actions) and settings.init is not None:
        source = Path(settings.init)
        if passes_on(settings):
            return _passed_on(context, stage, source)
    job = OfflineJob(
        stage=stage,
        config=context.config,
        settings=settings,
        source=None if source is None else str(source),
        base=base,
        checkpoints=str(context.checkpoints),
    )
    last = LastMetrics()

    def log(update: int, metrics: dict[str, float]) -> None:
        last(metrics)
        context.log.log(stage, update, metrics)

    start = updates_done(job, context.log.message)
    context.log.truncate(stage, start)
    context.log.begin(stage, settings.updates)
    if settings.num_workers == 1:
        torch.set_num_threads(context.config.cluster.learner_threads)
        work(job, log)
    else:
        with connected(context.config):
            run_workers(job, log)
    seals.saved(context.run_dir, stage, keep=0)
    return StageResult(checkpoint=context.result(stage), metrics=last.values)


def _passed_on(context: StageContext, stage: str, source: Path) -> StageResult:
    """The result of a stage that trains nothing, from a checkpoint (an export, a bank's world) by which nothing can be
    measured, for want of an inverse dynamics model: the model is not even loaded."""
    weights = {name: tensor.numpy() for name, tensor in load_policy(source).state_dict().items()}
    info = {"stage": stage, "metrics": {}} | circumstances(context.config, context.run_dir, stage, 0)
    context.log.begin(stage, 0)
    checkpoints.write(context.result(stage), files=lambda folder: with_policy(source, folder, weights), info=info)
    return StageResult(checkpoint=context.result(stage))
