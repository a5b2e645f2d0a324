"""Decoding by token: the next token is chosen from the mixture over codes, sum_a pi(a) p(x | a), not by way of a code.

Inside a span the code is not chosen again: its probabilities there are those given the span's tokens so far (Bayes'
rule), and the code that is recorded is that of the span's first token.
Axes: b rows of a step, S slots, k codes of the mixture, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch

from latent_control.base_lm import BaseLM
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.slot_memory import SpanMemory
from latent_control.distributions import action_log_probs, sample_actions

NUMBERS_AT_ONCE = 2**25
"""Token logits held at once (128 MiB in float32): rows, and of large codebooks codes, are computed in parts."""

Pick: TypeAlias = Callable[[torch.Tensor, slice], torch.Tensor]
"""Probabilities [b, V] of the rows in a slice -> their tokens [b]."""


class MixtureDecoder:
    """Chooses the tokens of an engine's rows from the mixture over ``count`` codes (``None``: all).

    Raises:
        ValueError: the actor has no codes.
    """

    def __init__(self, base: BaseLM, actor: ActionDecoder, count: int | None, slots: int) -> None:
        if actor.world_logits is None:
            raise ValueError(
                "decode='token' sums over latent codes, and here an action is a token: leave decode out, the most "
                "likely action is the most likely token"
            )
        self.world_logits = actor.world_logits
        self.count = count
        self.vocabulary = base.lm.get_output_embeddings().weight.shape[0]
        self.held = SpanMemory(actor.span, slots, base.lm.device)
        """The codes [S, k] of each span and their log-probabilities [S, k] given its tokens"""

    def choose(
        self,
        slots: list[int],
        places: list[int],
        final: torch.Tensor | None,
        log_probs: torch.Tensor,
        pick: Pick,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(code [b], token [b]) of rows in ``slots`` that have ``places`` tokens each; the code is the one with the
        largest responsibility pi(a) p(token | a) for the token, at a tie the likelier one, then the lower number.

        Args:
            final: the base's final states [b, D].
            log_probs: of the policy, [b, N].
            pick: chooses the tokens.
        """
        assert final is not None, "the world model reads the base's final state"
        codes, weights = likeliest(log_probs, self.count)
        if self.held.span > 1:
            codes, weights = self.held.carry(slots, places, codes, weights)
        at_once = max(1, NUMBERS_AT_ONCE // (codes.shape[1] * self.vocabulary))
        parts_at = (slice(start, start + at_once) for start in range(0, len(final), at_once))
        some = [self._tokens(final[at], codes[at], weights[at], pick, at) for at in parts_at]
        tokens, joint = (torch.cat(parts) for parts in zip(*some, strict=True))
        if self.held.span > 1:
            self.held.put(slots, codes, joint.log_softmax(-1))
        return codes.gather(1, joint.argmax(1, keepdim=True))[:, 0], tokens

    def _tokens(
        self, final: torch.Tensor, codes: torch.Tensor, weights: torch.Tensor, pick: Pick, at: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [b] and log pi(a) p(token | a) [b, k]."""
        parts = codes.split(max(1, NUMBERS_AT_ONCE // self.vocabulary), dim=1)

        def given_codes() -> Iterable[torch.Tensor]:  # p(x | a) [b, part of k, V]
            for part in parts:
                yield self.world_logits(final[:, None], part).float().softmax(-1)

        given = list(given_codes()) if len(parts) == 1 else None  # several parts are computed twice rather than kept
        shares = weights.exp().split(parts[0].shape[1], dim=1)
        mixed = sum(share[:, None] @ p for share, p in zip(shares, given or given_codes(), strict=True))[:, 0]
        tokens = pick(mixed, at)
        taken = [p.gather(2, tokens[:, None, None].expand(-1, p.shape[1], 1))[..., 0] for p in given or given_codes()]
        return tokens, weights + torch.cat(taken, dim=1).log()


def likeliest(log_probs: torch.Tensor, count: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` most likely codes of [b, N], lower numbers at a tie, and their log-probabilities: [b, k] each."""
    weights, codes = log_probs.sort(dim=-1, descending=True, stable=True)
    return codes[:, :count], weights[:, :count]


def pick_tokens(mixed: torch.Tensor, at: slice, *, temperature: float, uniforms: torch.Tensor) -> torch.Tensor:
    """The most likely tokens [b] of probabilities [b, V], or those sampled by ``uniforms[at]``."""
    if temperature == 0:
        return mixed.argmax(-1)
    return sample_actions(action_log_probs(mixed.log(), temperature=temperature), uniforms[at])
