"""How actions are chosen and become tokens: by the latent policy, by the bare base LM, or by a token-level policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig

from latent_control.base import BaseLM, final_logits
from latent_control.tower import Tower

if TYPE_CHECKING:
    from latent_control.model import LatentActionLM


@dataclass(frozen=True, kw_only=True)
class Actor:
    """How actions are chosen and become tokens; three of these exist: latent policy, token-level policy, base LM."""

    tower: Tower | None
    """Blocks between the base's state and ``head``; ``None``: the head reads the state as it is."""
    reads: str
    """Which of the base's states tower (or head) reads, "final" or "late"."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """hidden [B, D] -> logits [B, actions]"""
    emit: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]
    """(the base's final state [B, D], actions [B]) -> tokens [B]"""


def latent_actor(model: LatentActionLM) -> Actor:
    """The policy picks a code; the world model emits that code's most likely token. The codes' share of the merge is tabulated."""
    table = model.merge.table(model.codebook)

    def emit(final: torch.Tensor | None, actions: torch.Tensor) -> torch.Tensor:
        assert final is not None
        return model.head(final, model.merge.lookup(final.to(model.codebook.dtype), actions, table)).argmax(-1)

    return Actor(tower=model.policy, reads=model.config.policy_reads, head=model.policy.head, emit=emit)


def base_actor(base: BaseLM) -> Actor:
    """The bare base LM: an action is a token."""
    return Actor(tower=None, reads="final", head=base.logits, emit=lambda _, actions: actions)


def token_actor(policy: Tower) -> Actor:
    """The token-level baseline: ``policy`` (see ``token_policy``) on the base's ``late`` state, an action is a token."""
    return Actor(tower=policy, reads="late", head=policy.head, emit=lambda _, actions: actions)


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
