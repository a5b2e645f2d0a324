"""How one token is chosen from probabilities over the vocabulary: biases, penalties, temperature, min-p, top-p.

Biases and penalties are added to log-probabilities, which are logits up to a constant that the softmax takes away: so
they have the same meaning over a mixture as over one language model's logits. Axis: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import torch


class TokenGrammar(Protocol):
    """Which tokens may come next in one row."""

    def allowed(self) -> torch.Tensor:
        """bool [V]"""

    def take(self, token: int) -> bool:
        """Go on behind a token; whether nothing can follow it."""


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """``TokenChoice(top_p=0.9, presence_penalty=0.5, bias={42: -100.0})``; penalties count a row's generated tokens.

    Penalties are OpenAI's: log p(x) - frequency * count(x) - presence * [count(x) > 0]. top-p (Holtzman et al., 2020)
    keeps the likeliest tokens up to a probability of ``top_p`` together; min-p (Nguyen et al., 2024) those with at
    least ``min_p`` of the likeliest one's.
    """

    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    def shifted(self, log_probs: torch.Tensor, counts: Counter[int]) -> torch.Tensor:
        """Log-probabilities [V] with bias and penalties."""
        changes = dict(self.bias)
        if self.presence_penalty or self.frequency_penalty:
            for token, count in counts.items():
                penalty = self.presence_penalty + self.frequency_penalty * count
                changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return log_probs
        where = torch.tensor([*changes], device=log_probs.device)
        return log_probs.index_add(0, where, log_probs.new_tensor([*changes.values()]))

    def cut(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [V] after the temperature, normalised over the tokens that min-p and top-p keep."""
        if self.min_p > 0:
            least = log_probs.max() + torch.tensor(self.min_p).log()
            log_probs = log_probs.masked_fill(log_probs < least, float("-inf")).log_softmax(-1)
        if self.top_p < 1:
            ordered, tokens = log_probs.sort(descending=True, stable=True)
            before = ordered.exp().cumsum(-1) - ordered.exp()
            log_probs = log_probs.index_fill(0, tokens[before >= self.top_p], float("-inf")).log_softmax(-1)
        return log_probs


PLAIN = TokenChoice()
