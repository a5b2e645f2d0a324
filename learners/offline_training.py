"""The loop of the offline stages, on ``accelerate``: one device, several Ray Train workers, bf16, FSDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from configs.schema import Training
from latent_control.distributions import rollout_seed
from latent_control.model import LatentActionLM
from latent_control.records import TokenBatch
from learners.learning_rate import learning_rate_share
from learners.sharding import gathered, whole


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Where training stands; what a stage's loss may depend on besides the batch."""

    update: int
    updates: int
    positions: float
    """Loss positions of the whole batch divided by the number of workers."""
    generator: torch.Generator
    context: Any
    """What the stage's ``whole_batch`` returned."""


class OfflineStage(nn.Module):
    """A stage: which tensors it trains and the loss that moves them. ``forward`` returns (loss, metrics) of a
    microbatch."""

    def __init__(self, model: LatentActionLM) -> None:
        super().__init__()
        self.model = model

    def trainable(self) -> list[nn.Parameter]:
        """The only tensors this stage changes."""
        raise NotImplementedError

    def whole_batch(self, batch: TokenBatch, accelerator: Accelerator, microbatch: int) -> Any:
        """What must be known of the whole batch before its microbatches; nothing by default."""
        return None

    def positions(self, batch: TokenBatch) -> torch.Tensor:
        """Number of positions the loss is a mean over."""
        return batch.response_mask[:, 1:].sum()

    def finish(self) -> None:
        """Called once after the last update."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls; the pipeline supplies them."""

    log: Callable[[int, dict[str, float]], None]
    evaluate: Callable[[int], dict[str, float]]
    save: Callable[[int], None]


def make_optimizer(stage: OfflineStage, settings: Training) -> torch.optim.Optimizer:
    """AdamW over the stage's tensors; no weight decay on codebook, norms and other vectors."""
    for parameter in stage.parameters():
        parameter.requires_grad_(False)
    trainable = stage.trainable()
    for parameter in trainable:
        parameter.requires_grad_(True)
    exempt = {id(stage.model.codebook)} | {id(p) for p in trainable if p.ndim < 2}
    groups = [
        {"params": [p for p in trainable if id(p) not in exempt], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if id(p) in exempt], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, betas=(0.9, 0.95))


def train(
    stage: OfflineStage,
    batches: Iterator[TokenBatch],
    *,
    settings: Training,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    seed: int,
    start: int,
    hooks: Hooks,
) -> None:
    """Run updates ``start`` .. ``settings.updates``; logs, evaluates and saves through ``hooks`` on the way.

    Raises:
        FloatingPointError: the loss is not finite; nothing was changed by that update.
    """
    module: nn.Module = stage if isinstance(stage, FSDPModule) else accelerator.prepare(stage)
    optimizer = accelerator.prepare(optimizer)
    for update in range(start, settings.updates):
        rate = settings.learning_rate * learning_rate_share(settings, update)
        for group in optimizer.param_groups:
            group["lr"] = rate
        metrics = one_update(
            stage,
            module,
            next(batches),
            settings=settings,
            accelerator=accelerator,
            optimizer=optimizer,
            seed=seed,
            update=update,
        )
        done = update + 1
        if done % settings.evaluate_every == 0 or done == settings.updates:
            metrics |= hooks.evaluate(done)
        hooks.log(done, metrics | {"learning_rate": rate})
        if done % settings.checkpoint_every == 0 and done < settings.updates:
            hooks.save(done)
    stage.finish()


def one_update(
    stage: OfflineStage,
    module: nn.Module,
    batch: TokenBatch,
    *,
    settings: Training,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    seed: int,
    update: int,
) -> dict[str, float]:
    """Accumulate the gradient of the batch's microbatches and take one optimiser step; returns the update's metrics."""
    batch = batch.to(accelerator.device)
    rows = len(batch.input_ids)
    size = min(rows, settings.microbatch_size or rows)
    positions = accelerator.reduce(stage.positions(batch).float(), reduction="mean").clamp(min=1)
    generator = torch.Generator(accelerator.device).manual_seed(rollout_seed(seed, update, accelerator.process_index))
    # Not accelerate's own: its number type is one for the whole process, and stages may differ.
    autocast = partial(
        torch.autocast, accelerator.device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16"
    )
    with gathered(stage), autocast():
        context = stage.whole_batch(batch, accelerator, size)
    step = TrainingStep(
        update=update, updates=settings.updates, positions=float(positions), generator=generator, context=context
    )
    totals: dict[str, torch.Tensor] = {}
    for first in range(0, rows, size):
        last = first + size >= rows
        with accelerator.accumulate(module) if last else accelerator.no_sync(module), autocast():
            loss, metrics = module(batch.rows(first, min(first + size, rows)), step)
            accelerator.backward(loss.float())
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] = totals.get(name, 0.0) + value
    if not torch.isfinite(totals["loss"]):
        raise FloatingPointError(
            f"the loss of update {update} is {float(totals['loss'])}: lower learning_rate, or look for broken rows in "
            "the data"
        )
    norm = accelerator.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], settings.gradient_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: float(accelerator.reduce(value, reduction="mean")) for name, value in totals.items()} | {
        "gradient_norm": float(whole(norm))
    }
