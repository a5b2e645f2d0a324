"""The merge module: features + code -> state of the language world model (method: CoLA, section 3.1, and its published
code)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from latent_control.linear import linear


class MergeBlock(nn.Module):
    """s + Down(silu(Gate [s; c]) * Up [s; c]), no biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(2 * width, inner, bias=False)
        self.up_proj = nn.Linear(2 * width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def code_terms(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The share of Gate and Up that depends on the code alone: [..., D] -> two of [..., inner]."""
        width = codes.shape[-1]
        return F.linear(codes, self.gate_proj.weight[:, width:]), F.linear(codes, self.up_proj.weight[:, width:])

    def forward(self, state: torch.Tensor, terms: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Next state [..., D] from ``state`` [..., D] and the code's terms."""
        width = state.shape[-1]
        gate = F.linear(state, self.gate_proj.weight[:, :width]) + terms[0]
        up = F.linear(state, self.up_proj.weight[:, :width]) + terms[1]
        return state + self.down_proj(F.silu(gate) * up)


Table = list[tuple[torch.Tensor, torch.Tensor]]
"""Per block: the state's share of Gate and Up, joined, [2 * inner, D]; the code terms of all codes, joined, [N, 2 *
inner]."""


class Merge(nn.Module):
    """``n_m`` merge blocks. With ``identity_start`` the output equals the features, bit for bit, until trained."""

    def __init__(self, width: int, inner: int, blocks: int, *, identity_start: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MergeBlock(width, inner) for _ in range(blocks))
        for name, weight in self.named_parameters():
            nn.init.normal_(weight, std=0.02)
            if identity_start and "down_proj" in name:
                nn.init.zeros_(weight)

    def forward(self, features: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """State [..., D] from features [..., D] and code vectors [..., D]."""
        state = features
        for block in self.blocks:
            state = block(state, block.code_terms(codes))
        return state

    def table(self, codebook: torch.Tensor) -> Table:
        """What of the blocks depends on a whole codebook [N, D], computed once for many steps."""
        width = codebook.shape[-1]
        return [
            (
                torch.cat([block.gate_proj.weight[:, :width], block.up_proj.weight[:, :width]]),
                torch.cat(block.code_terms(codebook), dim=-1),
            )
            for block in self.blocks
        ]

    def lookup(self, features: torch.Tensor, actions: torch.Tensor, table: Table) -> torch.Tensor:
        """``forward`` with codes given by number: features [..., D], actions [...] -> state [..., D]."""
        state = features
        for block, (weight, terms) in zip(self.blocks, table, strict=True):
            gate, up = (linear(state, weight) + F.embedding(actions, terms)).chunk(2, -1)
            state = state + linear(F.silu(gate) * up, block.down_proj.weight)
        return state
