"""What an architecture does around its language head: scales (Granite, Cohere, MiniCPM3), soft caps (Gemma 2).

Read off the model's own forward pass, with known numbers in place of its blocks and its head: names of settings mean
different things (``logits_scaling`` divides in Granite and multiplies in HyperCLOVA X), and some are not used at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

_LOGITS = (1e9, 1e-3, -2e-3, -40.0, -3.0, -0.5, 0.0, 0.25, 1.0, 7.0)


class HeadRule(NamedTuple):
    """``HeadRule(scale=0.25, cap=30.0)(logits)``"""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """What becomes of the head's output."""
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class _Output(tuple[torch.Tensor]):
    """The states of a pass; whatever else it may be asked for, there is none."""

    def __getattr__(self, name: str) -> torch.Tensor | None:
        return self[0] if name == "last_hidden_state" else None


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


@torch.no_grad()
def head_rule(lm: PreTrainedModel, decoder: PreTrainedModel) -> HeadRule:
    """The rule of ``lm``, whose blocks are ``decoder``; its weights are not read and may be absent (meta).

    Raises:
        ValueError: it does something else than to scale and cap logits.
    """
    head, read = lm.get_output_embeddings(), list[torch.Tensor]()
    states = torch.linspace(1, 2, decoder.config.hidden_size, device="cpu")[None, None]
    logits = torch.tensor(_LOGITS, device="cpu")

    def output(given: torch.Tensor) -> torch.Tensor:
        read.append(given)
        return logits[None, None]

    token = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
    with _instead(decoder, lambda *_, **__: _Output((states,))), _instead(head, output):
        found = lm(input_ids=token, use_cache=False).logits[0, 0].double()
    before = float((read[0] / states).mean())
    cap = float(found[0]) if found[0] < 1e6 else None
    slope = float(found[1] / logits[1])
    rule = HeadRule(_rounded(slope * before), cap)
    fits = torch.allclose(rule(logits.double() / before), found, rtol=1e-4, atol=1e-6)
    if not fits or not torch.allclose(read[0], states * before) or (before != 1 and head.bias is not None):
        raise ValueError("it does something else to its logits than to scale and to cap them")
    return rule


def _rounded(scale: float) -> float:
    """To what a config says: float32 has about seven digits."""
    return round(scale, 6 - math.floor(math.log10(abs(scale))))
