"""How actions are chosen and become tokens: by the latent policy, by the bare base LM, or by a token-level policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig

from latent_control.base import BaseLM, final_logits
from latent_control.decoding import Actor
from latent_control.records import Features
from latent_control.tower import Tower

if TYPE_CHECKING:
    from latent_control.model import LatentActionLM


def latent_actor(model: LatentActionLM) -> Actor:
    """The policy picks a code; the world model emits that code's most likely token. The codes' share of the merge is tabulated."""
    reads, table = model.config.policy_reads, model.merge.table(model.codebook)

    def emit(features: Features, actions: torch.Tensor) -> torch.Tensor:
        last = features.read("final")[:, -1]
        return model.head(last, model.merge.lookup(last.to(model.codebook.dtype), actions, table)).argmax(-1)

    return Actor(
        logits=lambda features, mask, positions, cache: model.policy(features.read(reads), mask, cache, positions)[:, -1],
        emit=emit,
        new_cache=model.policy.new_cache,
        state=lambda features: features.read(reads),
    )


def base_actor(base: BaseLM) -> Actor:
    """The bare base LM: an action is a token."""
    return Actor(
        logits=lambda features, *_: base.logits(features.read("final")[:, -1]),
        emit=lambda _, actions: actions,
        new_cache=base.new_cache,
        state=lambda features: features.read("final"),
    )


def token_actor(base: BaseLM, policy: Tower) -> Actor:
    """The token-level baseline: ``policy`` (see ``token_policy``) on the base's ``late`` state, an action is a token."""
    return Actor(
        logits=lambda features, mask, positions, cache: policy(features.read("late"), mask, cache, positions)[:, -1],
        emit=lambda _, actions: actions,
        new_cache=policy.new_cache,
        state=lambda features: features.read("late"),
    )


class LanguageHead(nn.Linear):
    """A copy of a base LM's language head, with what the architecture does to its output."""

    def __init__(self, head: nn.Linear, config: PreTrainedConfig) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None)
        self.config = config
        self.load_state_dict(head.state_dict())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of states [..., D]."""
        return final_logits(super().forward(states), self.config)


def token_policy(base: BaseLM) -> Tower:
    """The base's own last blocks as a tower under its own, frozen, language head; before training it is exactly the base LM.

    Raises:
        ValueError: ``base`` supplies no ``late`` state for it to read.
    """
    if not base.late_blocks:
        raise ValueError("a token-level policy reads the late state: make the base with late_blocks >= 1")
    tower = Tower(base.decoder, base.late_blocks, 1)
    tower.start_from(base.decoder)
    head = base.lm.get_output_embeddings()
    tower.head = LanguageHead(head, base.decoder.config)
    tower.head.requires_grad_(False)
    return tower
