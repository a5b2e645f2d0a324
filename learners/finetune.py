"""Stage 2: fine-tuning under action guidance (FTA), and the same without codes. Both train the base LM."""

from __future__ import annotations

import torch
from torch import nn

from configs.schema import Finetune
from latent_control.losses import Metrics
from latent_control.model import LatentActionLM, token_nll
from latent_control.records import Features, TokenBatch
from learners.offline_training import OfflineStage, TrainingStep


class TokenSFTStage(OfflineStage):
    """The base LM alone learns the same response tokens: where the token level starts that a fine-tuned model is
    compared with."""

    def trainable(self) -> list[nn.Parameter]:
        """The base LM."""
        return list(self.model.base.lm.parameters())

    def forward(self, batch: TokenBatch, step: TrainingStep) -> tuple[torch.Tensor, Metrics]:
        """Cross-entropy of one microbatch."""
        mask = batch.response_mask[:, 1:]
        logits = self.model.base.logits(self.model.features(batch.input_ids).read("final")[:, :-1][mask])
        loss = token_nll(logits, batch.input_ids[:, 1:][mask]).sum() / step.positions
        return loss, {"nll_train": loss.detach()}


class FinetuneStage(OfflineStage):
    """Response tokens become likely given their codes; the gradient reaches the base through every path of the
    features.

    FTA-P takes the codes from the latent policy (as decoding will), FTA-I from the inverse dynamics model. Differs from
    the published code, whose FTA-P reaches the base through one term only.
    """

    def __init__(self, model: LatentActionLM, settings: Finetune) -> None:
        super().__init__(model)
        self.settings = settings

    def trainable(self) -> list[nn.Parameter]:
        """The base LM and, with ``train_merge``, the merge module. Its language head too, so tied weights stay tied."""
        merge = list(self.model.merge.parameters()) if self.settings.train_merge else []
        return [*self.model.base.lm.parameters(), *merge]

    @torch.no_grad()
    def _codes(self, features: Features, mask: torch.Tensor) -> torch.Tensor:
        spans = self.model.spans(mask)
        if self.settings.codes == "policy":
            return self.model.policy_logits(features)[:, :-1][spans.starts].argmax(-1)[spans.number]
        return spans.labels(self.model.inverse_dynamics_logits(features))[mask].argmax(-1)

    def forward(self, batch: TokenBatch, step: TrainingStep) -> tuple[torch.Tensor, Metrics]:
        """Cross-entropy of one microbatch."""
        mask = batch.response_mask[:, 1:]
        features = self.model.features(batch.input_ids)
        actions = self._codes(features.detach(), mask)
        world = self.model.world_logits_from_codes(features.read("final")[:, :-1][mask], self.model.codebook[actions])
        loss = token_nll(world, batch.input_ids[:, 1:][mask]).sum() / step.positions
        return loss, {"nll_codes_train": loss.detach()}
