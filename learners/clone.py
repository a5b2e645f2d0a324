"""Stage 1b: behaviour cloning of the latent policy; everything else is frozen."""

from __future__ import annotations

import torch
from torch import nn

from configs.schema import Clone
from latent_control.losses import Metrics, cloning_loss
from latent_control.model import LatentActionLM
from latent_control.records import TokenBatch
from learners.offline import OfflineStage, Step


class CloneStage(OfflineStage):
    """The policy learns the inverse dynamics model's codes without its look into the future."""

    def __init__(self, model: LatentActionLM, settings: Clone) -> None:
        super().__init__(model)
        self.settings = settings

    def trainable(self) -> list[nn.Parameter]:
        """The latent policy."""
        return self.model.policy.trainable()

    def forward(self, batch: TokenBatch, step: Step) -> tuple[torch.Tensor, Metrics]:
        """Loss of one microbatch."""
        mask = batch.response_mask[:, 1:]
        features = self.model.features(batch.input_ids)
        with torch.no_grad():
            targets = self.model.inverse_dynamics_logits(features)[:, 1:][mask]
        policy = self.model.policy_logits(features)[:, :-1][mask]
        return cloning_loss(policy, targets, soft=self.settings.targets == "soft", positions=step.positions)
