"""Llama-shaped blocks for decoding, in as few tensor operations as the formulas allow.

``transformers`` blocks are written for every use; with one position per row most of their time is overhead. The blocks here are
the same modules with the same weights: query, key and value projections are joined, as are gate and up, and the original
parameters become views of the joined ones, so nothing is stored twice and changing weights in place changes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from latent_control.linear import linear
from latent_control.slots import SlotLayer
from latent_control.tower import position_ids

# Blocks: x + Attention(RMSNorm(x)), x + Down(act(Gate RMSNorm(x)) * Up RMSNorm(x)), rotary positions, causal over everything.
SUPPORTED = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}

_known: WeakKeyDictionary[nn.Module, LeanBlocks] = WeakKeyDictionary()


def lean_blocks(decoder: nn.Module) -> LeanBlocks | None:
    """The lean form of ``decoder``, or ``None`` where its blocks are not of the kind (or not plain tensors)."""
    if type(decoder).__name__ not in SUPPORTED or _slides(decoder.config) or not _plain(decoder):
        return None
    if decoder in _known and _known[decoder].valid(decoder):
        return _known[decoder]
    with torch.inference_mode(False), torch.no_grad():
        _known[decoder] = LeanBlocks(decoder)
    return _known[decoder]


def _plain(decoder: Any) -> bool:
    """Whether all projections are ordinary linear layers: not quantised, not adapted, not sharded."""
    linears = [module for block in _blocks(decoder) for module in block.modules() if hasattr(module, "weight") and module.weight.ndim == 2]
    return all(type(linear) is nn.Linear and type(linear.weight.data) is torch.Tensor for linear in linears)


def _slides(config: Any) -> bool:
    """Whether some blocks see a sliding window only."""
    layer_types = getattr(config, "layer_types", None)
    return "sliding_attention" in layer_types if layer_types else getattr(config, "sliding_window", None) is not None


def _blocks(decoder: Any) -> list[Any]:
    """Its blocks, without those that were dropped."""
    return [block for block in decoder.layers if hasattr(block, "self_attn")]


def _joinable(block: Any) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """Linear layers with the same input: (query, key, value), (gate, up)."""
    attention, mlp = block.self_attn, block.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]


class Joined:
    """Linear layers on the same input as one; their parameters become views of the joined ones."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = linears
        self.weight = self._join([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.bias = self._join(biases) if biases else None
        assert len(biases) in (0, len(linears))

    @staticmethod
    def _join(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        joined = torch.cat([p.data for p in parameters])
        for parameter, view in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
            parameter.data = view
        return joined

    def valid(self, linears: Sequence[nn.Linear]) -> bool:
        """Whether these are the layers, and their parameters still are views of the joined ones (``to`` replaces them)."""
        first = linears[0].weight
        return (
            self.linears == linears
            and first.data_ptr() == self.weight.data_ptr()
            and first.dtype == self.weight.dtype
            and first.device == self.weight.device
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


Rotation = tuple[torch.Tensor, torch.Tensor]
"""cos [B, T, 1, d] and, for the halves swapped, sin with the first half negated."""


class LeanBlock:
    """One decoder block."""

    def __init__(self, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.qkv, self.gate_up = (Joined(linears) for linears in _joinable(block))
        self.attention, self.mlp, self.norms = attention, mlp, (block.input_layernorm, block.post_attention_layernorm)
        self.size: int = attention.head_dim
        self.heads, self.kv_heads = (len(p.weight) // self.size for p in (attention.q_proj, attention.k_proj))

    def step(self, x: torch.Tensor, layer: SlotLayer, rotation: Rotation, mask: torch.Tensor) -> torch.Tensor:
        """One position per row, [B, D] -> [B, D]; ``mask`` [B * kv_heads, heads / kv_heads, W] is added to the scores."""
        rows = len(x)
        queries, keys, values = self._project(x[:, None], rotation)
        keys, values = layer.update(keys.transpose(1, 2), values.transpose(1, 2))
        queries = queries.reshape(rows * self.kv_heads, -1, self.size)
        scores = torch.baddbmm(mask, queries, keys.flatten(0, 1).mT, alpha=self.attention.scaling)
        return self._finish(x, torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(rows, -1))

    def prefill(
        self, x: torch.Tensor, rotation: Rotation, mask: torch.Tensor | None, *, last_only: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whole prompts [B, P, D]; ``mask`` [B, 1, P, P], True where a position may look, ``None`` for all before it.

        Returns:
            (states [B, P, D], or of the last position only [B, 1, D]; keys and values [B, kv_heads, P, d])
        """
        queries, keys, values = (projected.transpose(1, 2) for projected in self._project(x, rotation))
        if last_only:
            x, queries, mask = x[:, -1:], queries[:, :, -1:], None if mask is None else mask[:, :, -1:]
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and not last_only,
            scale=self.attention.scaling,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self._finish(x, mixed.transpose(1, 2).flatten(2)), keys, values

    def _project(self, x: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [B, T, heads, d] of x [B, T, D]."""
        heads = self.qkv(_norm(self.norms[0], x)).unflatten(-1, (-1, self.size))
        turned, values = heads.split([self.heads + self.kv_heads, self.kv_heads], -2)
        if hasattr(self.attention, "q_norm"):
            queries, keys = turned.split([self.heads, self.kv_heads], -2)
            turned = torch.cat([_norm(self.attention.q_norm, queries), _norm(self.attention.k_norm, keys)], -2)
        turned = torch.addcmul(turned * rotation[0], turned.roll(self.size // 2, -1), rotation[1])
        return turned[..., : self.heads, :], turned[..., self.heads :, :], values

    def _finish(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """What follows attention: output projection and MLP, each added to its input."""
        x = x + linear(mixed, self.attention.o_proj.weight, self.attention.o_proj.bias)
        gate, up = self.gate_up(_norm(self.norms[1], x)).chunk(2, -1)
        return x + linear(self.mlp.act_fn(gate) * up, self.mlp.down_proj.weight, self.mlp.down_proj.bias)


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class LeanBlocks:
    """A decoder's blocks and final norm."""

    def __init__(self, decoder: Any) -> None:
        self.rotary, self.final_norm = decoder.rotary_emb, decoder.norm
        self.blocks = [LeanBlock(block) for block in _blocks(decoder)]
        self.complete = len(self.blocks) == len(decoder.layers)

    def valid(self, decoder: Any) -> bool:
        """Whether the decoder still has these blocks, and their parameters are the joined ones."""
        pairs = [(lean, _joinable(block)) for lean, block in zip(self.blocks, _blocks(decoder), strict=False)]
        complete = len(self.blocks) == len(_blocks(decoder))
        return complete and all(lean.qkv.valid(qkv) and lean.gate_up.valid(gate_up) for lean, (qkv, gate_up) in pairs)

    def step(
        self, x: torch.Tensor, positions: torch.Tensor, cache: Cache, mask: torch.Tensor, late_blocks: int = 0
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """One position per row: x [B, D] at ``positions`` [B], added ``mask`` [B, W] over the cache's columns and the new one.

        Returns:
            (last state after the final norm [B, D], ``None`` when the last blocks were dropped; state entering the last
            ``late_blocks`` blocks [B, D], ``None`` when none were asked for)
        """
        first = self.blocks[0]
        groups = first.heads // first.kv_heads
        mask = mask[:, None, None].expand(-1, first.kv_heads, groups, -1).reshape(-1, groups, mask.shape[-1])
        rotation, late = self._rotation(x[:, None], positions[:, None]), None
        for number, block in enumerate(self.blocks):
            if number == self._entry(late_blocks):
                late = x
            x = block.step(x, cache.layers[number], rotation, mask)
        return (_norm(self.final_norm, x), late) if self.complete else (None, x)

    def prefill(
        self, x: torch.Tensor, attention_mask: torch.Tensor, cache: Cache, late_blocks: int = 0, *, last_only: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Whole prompts: x [B, P, D], left padded as ``attention_mask`` [B, P] says; fills the empty ``cache``.

        Returns:
            as ``step``, for all positions [B, P, D]; with ``last_only`` the last state is that of the last position, [B, 1, D]
        """
        mask = None
        if not bool(attention_mask.all()):
            width = attention_mask.shape[1]
            causal = torch.ones(width, width, dtype=torch.bool, device=x.device).tril()
            # A padded position may look at itself, or it would have nothing to look at.
            eye = torch.eye(width, dtype=torch.bool, device=x.device)
            mask = (causal & attention_mask.bool()[:, None, None]) | eye
        rotation, late = self._rotation(x, position_ids(attention_mask)), None
        for number, block in enumerate(self.blocks):
            if number == self._entry(late_blocks):
                late = x
            last = self.complete and number == len(self.blocks) - 1
            x, keys, values = block.prefill(x, rotation, mask, last_only=last_only and last)
            cache.update(keys, values, number)
        return (_norm(self.final_norm, x), late) if self.complete else (None, x)

    def _entry(self, late_blocks: int) -> int:
        """Number of the block that the late state enters."""
        return len(self.blocks) - late_blocks if late_blocks and self.complete else -1

    def _rotation(self, x: torch.Tensor, positions: torch.Tensor | None) -> Rotation:
        cos, sin = self.rotary(x, position_ids=positions)
        half = sin.shape[-1] // 2
        return cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, :, None]
