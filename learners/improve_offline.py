"""Improving the latent policy from stored rollouts alone; everything else is frozen and nothing is sampled."""

from __future__ import annotations

import copy

import torch
from torch import nn

from configs.schema import ImproveOffline
from latent_control.distributions import action_log_probs
from latent_control.losses import REGRESSION_WEIGHTS, Metrics, weighted_regression
from latent_control.model import LatentActionLM
from latent_control.policies.latent import LatentPolicy
from latent_control.records import RolloutBatch, TokenBatch
from learners.features import FeatureCache
from learners.offline_training import OfflineStage, TrainingStep


class ImproveOfflineStage(OfflineStage):
    """Regression on the stored codes, each rollout by the weight its advantage earns; KL to the policy the stage
    started from.

    ``temperature``: of the sampler, under which the policy will be played; its top-k truncation is left out here.
    """

    def __init__(self, model: LatentActionLM, settings: ImproveOffline, temperature: float = 1.0) -> None:
        super().__init__(model)
        self.settings, self.temperature = settings, temperature
        self.reference = copy.deepcopy(model.policy).eval()
        self.cache = FeatureCache(model, settings.cache_megabytes)

    def trainable(self) -> list[nn.Parameter]:
        """The latent policy."""
        return self.model.policy.trainable()

    def positions(self, batch: TokenBatch) -> torch.Tensor:
        """Where a code was chosen."""
        return self.model.spans(batch.response_mask[:, 1:]).starts.sum()

    def forward(self, batch: TokenBatch, step: TrainingStep) -> tuple[torch.Tensor, Metrics]:
        """Loss of one microbatch."""
        assert isinstance(batch, RolloutBatch)
        mask, states = self.model.spans(batch.response_mask[:, 1:]).starts, self.cache(batch)
        weights = REGRESSION_WEIGHTS[self.settings.method](
            batch.advantages, self.settings.temperature, self.settings.weight_cap
        )
        with torch.no_grad():
            reference = self._log_probs(self.reference, states, mask)
        return weighted_regression(
            self._log_probs(self.model.policy, states, mask),
            actions=batch.actions[:, 1:][mask],
            weights=weights[:, None].expand(mask.shape)[mask],
            reference_log_probs=reference,
            kl_coefficient=self.settings.kl_coefficient,
            positions=step.positions,
        )

    def _log_probs(self, policy: LatentPolicy, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return action_log_probs(policy.logits_at(states, mask), temperature=self.temperature)
