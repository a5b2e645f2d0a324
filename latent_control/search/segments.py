"""What one node of a tree adds to its parent: some tokens, and their share of the key-value caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Layers = tuple[tuple[torch.Tensor, torch.Tensor] | None, ...]
"""Per block: keys and values [H, n, d] of n tokens; ``None`` where a block stores nothing."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A prompt, or a chunk of generated tokens. Nothing of what lies before it is copied into it.

    ``Segment(tokens=(7, 3), actions=(5, 5), finished=False, stopped=False, base=.., policy=.., logits=.., final=..)``
    """

    tokens: tuple[int, ...]
    actions: tuple[int, ...]
    """The code of each token; empty for a prompt"""
    action_logp: tuple[float, ...]
    """Under the distribution it was sampled from; 0 inside a span"""
    finished: bool
    """It ends its response: by the end token, or because there is no more room."""
    stopped: bool
    """By the end token."""
    base: Layers = ()
    """Empty where the segment ends a response: nothing will follow it."""
    policy: Layers = ()
    logits: torch.Tensor | None = None
    """[actions], what the policy says after the last token"""
    final: torch.Tensor | None = None
    """[D], the base's final state there"""
    state: torch.Tensor | None = None
    """[D], the state the policy reads there, and with it the Q head"""
    last_q: float | None = None
    """Q of the last code where it was chosen, when a Q head is at hand"""

    @property
    def bytes(self) -> int:
        """Memory of the caches it holds."""
        tensors = [
            tensor for layers in (self.base, self.policy) for layer in layers if layer is not None for tensor in layer
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


Path = Sequence[Segment]
"""A prompt's segment followed by chunks."""


def width(path: Path) -> int:
    """Tokens of all its segments."""
    return sum(len(segment.tokens) for segment in path)


@dataclass(frozen=True, kw_only=True)
class SearchResponse:
    """A whole response. ``SearchResponse(tokens=(7, 3, 2), actions=(5, 1, 0), stopped=True, last_q=0.8)``."""

    tokens: tuple[int, ...]
    actions: tuple[int, ...]
    stopped: bool
    """It ended by itself."""
    last_q: float | None
    """Q of its last code, when a Q head is at hand"""


def response_of(chunks: Path) -> SearchResponse:
    """The response that a path's chunks make; the last of them is finished."""
    assert chunks[-1].finished
    return SearchResponse(
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        actions=tuple(action for chunk in chunks for action in chunk.actions),
        stopped=chunks[-1].stopped,
        last_q=chunks[-1].last_q,
    )


Judge = Callable[[int, SearchResponse], float]
"""(number of the prompt, a response to it) -> its value in [0, 1]: a verifier, a reward model, or a learned value."""


def learned_value(_: int, response: SearchResponse) -> float:
    """The judge that knows nothing but the Q head: Q of the last code. It does not see the answer."""
    assert response.last_q is not None, "the decoder has no Q head"
    return min(1.0, max(0.0, response.last_q))
