"""How actions are chosen and become tokens: by the latent policy, or by the bare base LM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from latent_control.base_lm import BaseLM
from latent_control.decoder_stack import DecoderStack
from latent_control.policies.bank import PolicyBank


@dataclass(frozen=True, kw_only=True)
class ActionDecoder:
    """How actions are chosen and become tokens; these exist: latent policy, base LM, policy over tokens
    (``token_policy``)."""

    stack: DecoderStack | None
    """Blocks between the base's state and ``head``; ``None``: the head reads the state at one position as it is."""
    reads: str
    """Which of the base's states the stack (or head) reads, "final", "late" or "both"."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """hidden [B, D] -> logits [B, actions]"""
    emit: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]
    """(the base's final state [B, D], actions [B]) -> tokens [B]"""
    world_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """(final states [..., D], codes [...], broadcast) -> logits [..., V] of the next token; ``None``: an action is a
    token"""
    span: int = 1
    """Tokens for which an action is held."""
    bank: PolicyBank | None = None
    """Policies in place of ``head`` for rows that name theirs (``SamplingParams.members``)."""

    def logits(self, hidden: torch.Tensor, members: Sequence[Any] | None) -> torch.Tensor:
        """[B, actions] of hidden [B, D]; by each row's own policy, where ``members`` names them."""
        return self.head(hidden) if members is None or self.bank is None else self.bank.logits(hidden, members)

    def require_members(self, members: Sequence[object] | None, prompts: int) -> None:
        """``ValueError`` unless there is a bank and a policy of it for each of the prompts, or no members at all."""
        if members is not None and (self.bank is None or len(members) != prompts):
            raise ValueError(
                f"members names policies for {len(members)} of {prompts} prompts, of "
                f"{'no' if self.bank is None else 'the'} bank: name one for each prompt, of the actor's bank"
            )


def base_actor(base: BaseLM) -> ActionDecoder:
    """The bare base LM: an action is a token."""
    return ActionDecoder(stack=None, reads="final", head=base.logits, emit=lambda _, actions: actions)
