"""Stage 1b: behaviour cloning of the latent policy; everything else is frozen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
        self.kept: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
        """States and targets by the rows they are of, where there are several passes: what is frozen says them once."""
        self.room = settings.cache_megabytes * 2**20 if settings.passes > 1 else 0
        self.read = 0
        """Microbatches that passed through the base."""

    def trainable(self) -> list[nn.Parameter]:
        """The latent policy."""
        return self.model.policy.trainable()

    def positions(self, batch: TokenBatch) -> torch.Tensor:
        """Where a code is chosen."""
        return self.model.spans(batch.response_mask[:, 1:]).starts.sum()

    def forward(self, batch: TokenBatch, step: TrainingStep) -> tuple[torch.Tensor, Metrics]:
        """Loss of one microbatch."""
        starts = self.model.spans(batch.response_mask[:, 1:]).starts
        states, targets = self._states_and_targets(batch, starts)
        policy = self.model.policy
        logits = policy(states) if policy.stateless else policy.logits_at(states, F.pad(starts, (0, 1)))
        return cloning_loss(logits, targets, soft=self.settings.targets == "soft", positions=step.positions)

    @torch.no_grad()
    def _states_and_targets(self, batch: TokenBatch, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the policy reads, at its choices alone ([M, D]) or everywhere ([B, T, D]), and the inverse dynamics
        model's logits [M, N]."""
        key = b"".join(t.cpu().numpy().tobytes() for t in (batch.input_ids, batch.response_mask)) if self.room else b""
        if (found := self.kept.get(key)) is not None:
            return found[0].to(starts.device), found[1].to(starts.device)
        self.read += 1
        features = self.model.features(batch.input_ids)
        targets = self.model.spans(batch.response_mask[:, 1:]).labels(self.model.inverse_dynamics_logits(features))
        states = features.read(self.model.config.policy_state)
        pair = states[:, :-1][starts] if self.model.policy.stateless else states, targets[starts]
        size = sum(tensor.numel() * tensor.element_size() for tensor in pair)
        if size <= self.room:
            self.kept[key] = (pair[0].to("cpu", copy=True), pair[1].to("cpu", copy=True))
            self.room -= size
        return pair

    def finish(self) -> None:
        """Free what was kept."""
        self.kept.clear()
