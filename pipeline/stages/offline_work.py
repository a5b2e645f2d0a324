"""What each worker of an offline stage does: build the model, train it, save it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from configs.checks import row_length
from configs.schema import Actions, Clone, Finetune, ImproveOffline, RunConfig, Training
from latent_control.model import LatentActionLM
from latent_control.pretrained import BASE, world_hash
from latent_control.records import TokenBatch
from latent_control.tensor_files import as_readable_as
from latent_control.text import load_tokenizer
from learners.actions import ActionsStage
from learners.clone import CloneStage
from learners.finetune import FinetuneStage, TokenSFTStage
from learners.improve_offline import ImproveOfflineStage
from learners.offline_training import Hooks, OfflineStage, make_optimizer, train
from learners.sharding import optimizer_state, restore_optimizer, shard, whole, whole_model_state
from pipeline.data.batches import heldout_batches, repeated, training_batches
from pipeline.replay.dataset import HELDOUT, read_rollouts, rollout_batches
from pipeline.runs import interrupts, seals
from pipeline.runs.layout import TOKEN_INFO
from pipeline.runs.stage_table import TOKEN_SFT
from pipeline.stages.fit_temperature import sharpen
from pipeline.stages.offline_job import Log, OfflineJob, updates_done
from pipeline.stages.offline_measures import measure
from pipeline.stages.token_checkpoint import write_info
from pipeline.storage import checkpoints
from rollout_workers.tasks import build_task


def build_stage(job: OfflineJob) -> OfflineStage:
    """The stage with its model: new modules, or the checkpoint before it."""
    config = job.config
    # Fine-tuning changes the base by less than bfloat16 resolves, so it keeps float32 masters.
    dtype = "float32" if isinstance(job.settings, Finetune) else config.base.dtype
    if job.source is not None:
        model = LatentActionLM.from_pretrained(job.source, dtype=dtype, trust_remote_code=config.base.trust_remote_code)
    else:
        assert isinstance(job.settings, Actions)
        model = new_model(job.settings, job.base, config, dtype)
    return stage_on(model, job)


def stage_on(model: LatentActionLM, job: OfflineJob) -> OfflineStage:
    """The job's stage with this model."""
    if job.stage == TOKEN_SFT:
        return TokenSFTStage(model)
    if isinstance(job.settings, ImproveOffline):
        return ImproveOfflineStage(model, job.settings, job.config.rollout.temperature)
    kinds: dict[type[Training], Any] = {Actions: ActionsStage, Clone: CloneStage, Finetune: FinetuneStage}
    return kinds[type(job.settings)](model, job.settings)


def accelerator_of(settings: Training) -> Accelerator:
    """This process's."""
    cpu = settings.gpus_per_worker == 0 and not torch.cuda.is_available()
    return Accelerator(cpu=cpu, **settings.accelerate)


def new_model(settings: Actions, base: str, config: RunConfig, dtype: str) -> LatentActionLM:
    """New modules beside the base LM, as the ``actions`` section shapes them."""
    shape = (
        "num_actions",
        "head",
        "inverse_dynamics_layers",
        "merge_layers",
        "inverse_dynamics_reads",
        "policy_kind",
        "policy_layers",
        "policy_width",
        "policy_reads",
    )
    arguments = {name: getattr(settings, name) for name in (*shape, "span", "look_ahead")}
    return LatentActionLM.from_base(
        base, dtype=dtype, trust_remote_code=config.base.trust_remote_code, seed=config.seed, **arguments
    )


def work(job: OfflineJob, log: Log) -> None:
    """Train the stage in this process, which may be one of several; the main one evaluates, logs and saves."""
    config, settings = job.config, job.settings
    accelerator = accelerator_of(settings)
    stage = build_stage(job)
    start = updates_done(job)
    optimizer = restored(job, stage, accelerator, Path(job.checkpoints) / f"{job.stage}-{start:08d}" if start else None)
    tokenizer = load_tokenizer(
        stage.model.base_source or str(job.source), trust_remote_code=config.base.trust_remote_code
    )
    batches, heldout = streams(job, stage, accelerator, tokenizer, start)
    main = accelerator.is_main_process

    def logged(update: int, metrics: dict[str, float]) -> None:
        try:
            log(update, metrics)
        except interrupts.Stopped as stop:
            if stop.whole:
                save_state(job, stage, optimizer, update, write=main)
            raise

    hooks = Hooks(
        log=logged if main else lambda *_: None,
        # The workers of a sharded model can only compute together.
        evaluate=lambda update: measure(job, stage, heldout, update) if main or settings.sharded else {},
        save=lambda update: save_state(job, stage, optimizer, update, write=main),
    )
    train(
        stage,
        batches,
        settings=settings,
        accelerator=accelerator,
        optimizer=optimizer,
        seed=config.seed,
        start=start,
        hooks=hooks,
    )
    accelerator.wait_for_everyone()
    plain = plain_copy(job, stage, main) if settings.sharded else stage
    if main:
        metrics = measure(job, plain, heldout, 0) if settings.updates == 0 else {}
        if isinstance(settings, Clone) and settings.fit_temperature:
            metrics |= sharpen(plain.model, config, tokenizer, settings.fit_temperature)
            log(settings.updates, metrics)
        save_result(job, plain, tokenizer, metrics)
    accelerator.wait_for_everyone()


def streams(
    job: OfflineJob, stage: OfflineStage, accelerator: Accelerator, tokenizer: Any, start: int
) -> tuple[Iterator[TokenBatch], list[Any]]:
    """(this process's training batches from update ``start`` on, what is held out for measures)."""
    config, settings = job.config, job.settings
    dealt = {"rank": accelerator.process_index, "world": accelerator.num_processes, "start": start}
    if isinstance(settings, ImproveOffline):
        found = read_rollouts(settings.data, world=world_hash(stage.model), versions=settings.policy_versions)
        training, held = found.split(settings.heldout_share)
        return rollout_batches(training, settings, seed=config.seed, **dealt), [held] if len(held) else []
    reading: dict[str, Any] = {
        "task": build_task(config.task),
        "tokenizer": tokenizer,
        "chat": config.task.chat,
        "max_length": row_length(config, settings),
        "seed": config.seed,
    }
    passes = settings.passes if isinstance(settings, Clone) else 1
    again = {"start": 0} if passes > 1 else {}
    batches = training_batches(settings.data, batch_size=settings.batch_size, **reading, **dealt | again)
    if passes > 1:
        distinct = -(-settings.updates // passes)
        batches = repeated(batches, distinct=max(1, distinct), seed=config.seed, start=start)
    return batches, heldout_batches(
        settings.data, batch_size=min(32, settings.batch_size), count=settings.evaluation_sequences, **reading
    )


def plain_copy(job: OfflineJob, stage: OfflineStage, main: bool) -> OfflineStage:
    """On the main process, a sharded stage put together again."""
    state = whole_model_state(stage)
    if main:
        stage = build_stage(job)
        stage.load_state_dict(state)
    return stage


def restored(
    job: OfflineJob, stage: OfflineStage, accelerator: Accelerator, folder: Path | None
) -> torch.optim.Optimizer:
    """The stage's optimiser; both as ``save_state`` left them in ``folder``, and split over the workers where asked
    for."""
    optimizer = make_optimizer(stage, job.settings)
    state = None if folder is None else checkpoints.load_tree(folder, "state")
    if state is not None:
        parameters = trained_names(stage)
        assert parameters.keys() == state["model"].keys(), f"{folder} was saved by another stage or shape"
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["model"][name])
    if job.settings.sharded:
        shard(stage, stage.model, accelerator.device, accelerator.num_processes)
        optimizer = make_optimizer(stage, job.settings)
    if state is not None:
        restore_optimizer(stage, optimizer, state["optimizer"])
    return optimizer


def trained_names(stage: OfflineStage) -> dict[str, torch.nn.Parameter]:
    """The stage's trained tensors by their name in the model."""
    return {name: p for name, p in stage.model.named_parameters() if p.requires_grad}


def save_state(
    job: OfflineJob, stage: OfflineStage, optimizer: torch.optim.Optimizer, update: int, *, write: bool
) -> None:
    """An intermediate checkpoint of trained tensors and optimiser state; every worker calls it, one writes."""
    state = {
        "model": {name: whole(p.detach()) for name, p in trained_names(stage).items()},
        "optimizer": optimizer_state(stage, optimizer),
    }
    if not write:
        return
    folder = Path(job.checkpoints) / f"{job.stage}-{update:08d}"
    info = {"stage": job.stage, "update": update} | job.circumstances(update)
    checkpoints.write(folder, files=lambda tmp: checkpoints.save_tree(tmp, "state", state), info=info)
    seals.saved(Path(job.checkpoints).parent, job.stage, keep=2)


def save_result(job: OfflineJob, stage: OfflineStage, tokenizer: Any, metrics: dict[str, float]) -> None:
    """The stage's final checkpoint; a fine-tuned base travels with it, in the precision it came in.

    So does the base of a published checkpoint, which has no separate folder. ``token_sft`` is a base LM alone, with
    the number of blocks that a token-level policy trains by default.
    """
    tuned = isinstance(job.settings, Finetune)
    bundle = tuned or stage.model.base_source is None

    def files(folder: Path) -> None:
        if tuned:
            stored = LatentActionLM.from_pretrained(str(job.source), dtype=job.config.base.dtype).base.dtype
            stage.model.base.lm.to(stored)
        if job.stage == TOKEN_SFT:
            stage.model.base.lm.save_pretrained(folder / BASE)
            write_info(folder, str(folder / BASE), stage.model.config.policy_layers)
            as_readable_as(folder / TOKEN_INFO)
        else:
            stage.model.save_pretrained(folder, bundle_base=bundle)
        if bundle:
            tokenizer.save_pretrained(folder / BASE)

    info: dict[str, Any] = {"stage": job.stage, "metrics": metrics} | job.circumstances(job.settings.updates)
    if isinstance(job.settings, ImproveOffline):
        info[HELDOUT] = job.settings.heldout_share
    checkpoints.write(job.result, files=files, info=info)
