"""Stage 1a: find the latent actions. Trains the inverse dynamics model, the codebook and the merge module; the base is
frozen."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from configs.schema import Actions
from latent_control.losses import Metrics, latent_action_loss, straight_through_codes, usage_of
from latent_control.model import LatentActionLM, token_nll
from latent_control.records import TokenBatch
from learners.offline_training import OfflineStage, TrainingStep


def gumbel_temperature(settings: Actions, update: int) -> float:
    """tau, falling geometrically from ``temperature`` to ``final_temperature`` over the first ``anneal_share`` of the
    updates."""
    progress = min(1.0, update / max(1.0, settings.anneal_share * settings.updates))
    return settings.temperature * (settings.final_temperature / settings.temperature) ** progress


class ActionsStage(OfflineStage):
    """The loss of method.md 4, stage 1a."""

    def __init__(self, model: LatentActionLM, settings: Actions) -> None:
        super().__init__(model)
        self.settings = settings

    def trainable(self) -> list[nn.Parameter]:
        """Inverse dynamics model, codebook, merge module."""
        assert self.model.inverse_dynamics is not None
        return [*self.model.inverse_dynamics.trainable(), self.model.codebook, *self.model.merge.parameters()]

    @torch.no_grad()
    def whole_batch(self, batch: TokenBatch, accelerator: Accelerator, microbatch: int) -> torch.Tensor | None:
        """qbar [N]: mean code probabilities over all microbatches and workers; a lone microbatch finds its own."""
        if microbatch >= len(batch.input_ids) and accelerator.num_processes == 1:
            return None
        usage = torch.zeros(self.model.config.num_actions, device=accelerator.device)
        for first in range(0, len(batch.input_ids), microbatch):
            part = batch.rows(first, min(first + microbatch, len(batch.input_ids)))
            mask = part.response_mask[:, 1:]
            logits = self.model.inverse_dynamics_logits(self.model.features(part.input_ids))
            usage += usage_of(self.model.spans(mask).labels(logits)[mask])
        usage = accelerator.reduce(usage, reduction="sum")
        return usage / usage.sum()

    def forward(self, batch: TokenBatch, step: TrainingStep) -> tuple[torch.Tensor, Metrics]:
        """Loss of one microbatch."""
        mask = batch.response_mask[:, 1:]
        features = self.model.features(batch.input_ids)
        spans = self.model.spans(mask)
        logits = spans.labels(self.model.inverse_dynamics_logits(features))[mask]
        temperature = gumbel_temperature(self.settings, step.update)
        codes, soft = straight_through_codes(logits[spans.first], temperature, step.generator)
        world = self.model.world_logits_from_codes(
            features.read("final")[:, :-1][mask], (codes @ self.model.codebook)[spans.number]
        )
        return latent_action_loss(
            token_nll(world, batch.input_ids[:, 1:][mask]),
            logits,
            soft[spans.number],
            usage=usage_of(logits.detach()) / len(logits) if step.context is None else step.context,
            usage_weight=self.settings.usage_weight,
            entropy_weight=self.settings.entropy_weight,
            positions=step.positions,
        )
