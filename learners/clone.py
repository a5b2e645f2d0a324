"""Stage 1b: behaviour cloning of the latent policy; everything else is frozen."""

from __future__ import annotations

import torch
from torch import nn

from configs.schema import Clone
from latent_control.losses import Metrics, cloning_loss
from latent_control.model import LatentActionLM
from latent_control.records import TokenBatch
from learners.offline_training import OfflineStage, TrainingStep


class CloneStage(OfflineStage):
    """The policy learns the inverse dynamics model's codes without its look into the future."""

    def __init__(self, model: LatentActionLM, settings: Clone) -> None:
        super().__init__(model)
        self.settings = settings

    def trainable(self) -> list[nn.Parameter]:
        """The latent policy."""
        return self.model.policy.trainable()

    def positions(self, batch: TokenBatch) -> torch.Tensor:
        """Where a code is chosen."""
        return self.model.spans(batch.response_mask[:, 1:]).starts.sum()

    def forward(self, batch: TokenBatch, step: TrainingStep) -> tuple[torch.Tensor, Metrics]:
        """Loss of one microbatch."""
        spans = self.model.spans(batch.response_mask[:, 1:])
        features = self.model.features(batch.input_ids)
        with torch.no_grad():
            targets = spans.labels(self.model.inverse_dynamics_logits(features))[spans.starts]
        policy = self.model.policy_logits(features)[:, :-1][spans.starts]
        return cloning_loss(policy, targets, soft=self.settings.targets == "soft", positions=step.positions)
