"""A latent policy without attention: a residual MLP on the base's final state at one position.

It has no cache and no state of its own, so the base's caches are the same for every version of it and for every other
policy of its kind, and a learner trains it on stored states without the base.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDEST = 256
"""Inner width where none is given, or the base's own where that is less: what is picked are N codes, however wide the
base is. With two layers and 64 codes: 0.16 M parameters beside a base of D = 128, 0.69 M of 576, 1.6 M of 4,096."""


class ResidualMlp(nn.Module):
    """x + down(silu(up(norm(x)))), twice as wide inside; what it adds is 0 at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., W] -> [..., W]."""
        added: torch.Tensor = self.down(F.silu(self.up(self.norm(x))))
        return x + added


class MlpPolicy(nn.Module):
    """Norm, a linear layer D -> W, ``layers`` residual MLPs, norm, a bias-free linear layer W -> outputs."""

    stateless = True
    """A position's logits depend on that position's state alone."""

    def __init__(self, state_width: int, outputs: int, *, layers: int, width: int | None = None) -> None:
        super().__init__()
        width = width or min(WIDEST, state_width)
        self.state_width = state_width
        self.norm, self.enter = nn.LayerNorm(state_width), nn.Linear(state_width, width)
        self.layers = nn.ModuleList(ResidualMlp(width) for _ in range(layers))
        self.leave, self.head = nn.LayerNorm(width), nn.Linear(width, outputs, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def trainable(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.parameters())

    def hidden(self, states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[..., D] -> [..., W] before the head; there is nothing to mask."""
        x = self.enter(self.norm(states.to(self.head.weight.dtype)))
        for layer in self.layers:
            x = layer(x)
        left: torch.Tensor = self.leave(x)
        return left

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [..., outputs] of states [..., D]."""
        logits: torch.Tensor = self.head(self.hidden(states))
        return logits

    def logits_at(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[M, outputs] at the positions ``mask`` [B, T] of states [B, T, D]."""
        return self(states[mask])
