"""Llama-shaped blocks for decoding, in as few tensor operations as the formulas allow.

``transformers`` blocks are written for every use; with one position per row most of their time is overhead. The blocks
here are the same modules with the same weights: query, key and value projections are joined, as are gate and up, and
the original parameters become views of the joined ones, so nothing is stored twice and changing weights in place
changes both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.activations import SiLUActivation

from latent_control.decoder_stack import last_positions
from latent_control.decoding.slot_memory import SlotLayer
from latent_control.linear import linear

# Blocks: x + Attention(RMSNorm(x)), x + Down(act(Gate RMSNorm(x)) * Up RMSNorm(x)), rotary positions, causal over
# everything.
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
    linears = [
        module
        for block in _blocks(decoder)
        for module in block.modules()
        if hasattr(module, "weight") and module.weight.ndim == 2
    ]
    return all(type(linear) is nn.Linear and type(linear.weight.data) is torch.Tensor for linear in linears)


def _slides(config: Any) -> bool:
    """Whether some blocks see a sliding window only."""
    layer_types = getattr(config, "layer_types", None)
    return "sliding_attention" in layer_types if layer_types else getattr(config, "sliding_window", None) is not None


def _blocks(decoder: Any) -> list[Any]:
    """Its blocks, without those that were dropped."""
    return [block for block in decoder.layers if hasattr(block, "self_attn")]


def _parts(block: Any) -> list[nn.Parameter]:
    """The weights of a block that are used as they are, and of those that are joined."""
    attention, mlp = block.self_attn, block.mlp
    modules = [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]
    return [module.weight for module in [*modules, block.input_layernorm, block.post_attention_layernorm]]


class Joined:
    """Linear layers on the same input as one; their parameters become views of the joined ones."""

    def __init__(self, *linears: nn.Linear) -> None:
        self.first = linears[0].weight
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

    def valid(self) -> bool:
        """Whether the parameters still are views of the joined ones (``to`` replaces them)."""
        return (self.first.data_ptr(), self.first.dtype) == (self.weight.data_ptr(), self.weight.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


Rotation = tuple[torch.Tensor, torch.Tensor]
"""cos [B, T, 1, d] and, for the halves swapped, sin with the first half negated."""


class LeanBlock:
    """One decoder block."""

    def __init__(self, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.parts = _parts(block)
        self.size: int = attention.head_dim
        self.heads, self.kv_heads = (len(p.weight) // self.size for p in (attention.q_proj, attention.k_proj))
        self.scaling: float = attention.scaling
        self.qkv = Joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = Joined(mlp.gate_proj, mlp.up_proj)
        self.out = attention.o_proj.weight, attention.o_proj.bias
        self.down = mlp.down_proj.weight, mlp.down_proj.bias
        self.activation = F.silu if isinstance(mlp.act_fn, nn.SiLU | SiLUActivation) else mlp.act_fn
        self.before, self.between = Norm(block.input_layernorm), Norm(block.post_attention_layernorm)
        self.head_norms = (Norm(attention.q_norm), Norm(attention.k_norm)) if hasattr(attention, "q_norm") else None

    def valid(self, block: Any) -> bool:
        """Whether ``block`` still holds the weights this was made of."""
        same = all(mine is theirs for mine, theirs in zip(self.parts, _parts(block), strict=True))
        return same and self.qkv.valid() and self.gate_up.valid()

    def step(self, x: torch.Tensor, layer: SlotLayer, rotation: Rotation, mask: torch.Tensor) -> torch.Tensor:
        """One position per row, [B, D] -> [B, D]; ``mask`` [B * kv_heads, heads / kv_heads, W] is added to the
        scores."""
        rows = len(x)
        queries, keys, values = self._project(x, rotation)
        keys, values = layer.update(keys[:, :, None], values[:, :, None])
        queries = queries.reshape(rows * self.kv_heads, -1, self.size)
        scores = torch.baddbmm(mask, queries, keys.flatten(0, 1).mT, alpha=self.scaling)
        return self._finish(x, torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(rows, -1))

    def prefill(
        self,
        x: torch.Tensor,
        rotation: Rotation,
        mask: torch.Tensor | None,
        extend: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        *,
        last_only: bool,
    ) -> torch.Tensor:
        """The last positions [B, S, D] of rows of W; ``mask`` [B, 1, S, W], True where one may look, ``None`` for all
        before it (then S = W). ``extend`` puts their keys and values [B, kv_heads, S, d] behind the row's others.

        Returns: states [B, S, D], or of the last position only [B, 1, D].
        """
        queries, keys, values = (projected.transpose(1, 2) for projected in self._project(x, rotation))
        keys, values = extend(keys, values)
        if last_only:
            x, queries, mask = x[:, -1:], queries[:, :, -1:], None if mask is None else mask[:, :, -1:]
        causal, grouped = mask is None and not last_only, self.heads != self.kv_heads
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, scale=self.scaling, enable_gqa=grouped
        )
        return self._finish(x, mixed.transpose(1, 2).flatten(2))

    def _project(self, x: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [..., heads, d] of x [..., D]."""
        heads = self.qkv(self.before(x)).view(*x.shape[:-1], -1, self.size)
        turned, values = heads.split([self.heads + self.kv_heads, self.kv_heads], -2)
        if self.head_norms is not None:
            parts = turned.split([self.heads, self.kv_heads], -2)
            turned = torch.cat([norm(part) for norm, part in zip(self.head_norms, parts, strict=True)], -2)
        turned = torch.addcmul(turned * rotation[0], turned.roll(self.size // 2, -1), rotation[1])
        queries, keys = turned.split([self.heads, self.kv_heads], -2)
        return queries, keys, values

    def _finish(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """What follows attention: output projection and MLP, each added to its input."""
        x = x + linear(mixed, *self.out)
        gate, up = self.gate_up(self.between(x)).chunk(2, -1)
        return x + linear(self.activation(gate) * up, *self.down)


class Norm:
    """Root-mean-square norm."""

    def __init__(self, norm: Any) -> None:
        self.weight, self.epsilon, self.shape = norm.weight, norm.variance_epsilon, tuple(norm.weight.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a step's new positions stand: the same for all stacks of one architecture."""

    rotation: Rotation
    mask: torch.Tensor
    """[B * kv_heads, heads / kv_heads, W]"""

    def to(self, dtype: torch.dtype) -> Place:
        """The same in another precision."""
        if self.mask.dtype == dtype:
            return self
        return Place(rotation=(self.rotation[0].to(dtype), self.rotation[1].to(dtype)), mask=self.mask.to(dtype))


class LeanBlocks:
    """A decoder's blocks and final norm."""

    def __init__(self, decoder: Any) -> None:
        self.rotary = decoder.rotary_emb
        self.final_norm = decoder.norm if isinstance(decoder.norm, nn.Identity) else Norm(decoder.norm)
        self.blocks = [LeanBlock(block) for block in _blocks(decoder)]
        self.complete = len(self.blocks) == len(decoder.layers)

    def valid(self, decoder: Any) -> bool:
        """Whether the decoder still has these blocks with these weights."""
        blocks = _blocks(decoder)
        return len(blocks) == len(self.blocks) and all(
            lean.valid(block) for lean, block in zip(self.blocks, blocks, strict=True)
        )

    def place(self, positions: torch.Tensor, seen: torch.Tensor, like: torch.Tensor) -> Place:
        """New positions [B] whose rows see the columns ``seen`` [B, W], in the dtype of ``like``."""
        first = self.blocks[0]
        groups = first.heads // first.kv_heads
        mask = torch.zeros(seen.shape, dtype=like.dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
        mask = mask[:, None, None].expand(-1, first.kv_heads, groups, -1).reshape(-1, groups, seen.shape[1])
        cos, sin = self._rotation(like, positions[:, None])
        return Place(rotation=(cos[:, 0], sin[:, 0]), mask=mask)

    def step(
        self, x: torch.Tensor, place: Place, cache: Cache, late_blocks: int = 0
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """One position per row, x [B, D].

        Returns:
            (last state after the final norm [B, D], ``None`` when the last blocks were dropped; state entering the last
            ``late_blocks`` blocks [B, D], ``None`` when none were asked for)
        """
        place, late, entry = place.to(x.dtype), None, self._entry(late_blocks)
        for number, block in enumerate(self.blocks):
            if number == entry:
                late = x
            x = block.step(x, cache.layers[number], place.rotation, place.mask)
        return (self.final_norm(x), late) if self.complete else (None, x)

    def prefill(
        self, x: torch.Tensor, attention_mask: torch.Tensor, cache: Cache, late_blocks: int = 0, *, last_only: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Prompts [B, W], left padded as ``attention_mask`` [B, W] says, of which ``cache`` holds all but the last S
        positions: x [B, S, D] is what enters there, and the cache is extended.

        Returns: as ``step``, for all S positions [B, S, D]; with ``last_only`` the last state is that of the last
            position, [B, 1, D]
        """
        mask, (width, fed) = None, (attention_mask.shape[1], x.shape[1])
        if fed < width or not bool(attention_mask.all()):
            causal = torch.ones(width, width, dtype=torch.bool, device=x.device).tril()
            # A padded position may look at itself, or it would have nothing to look at.
            eye = torch.eye(width, dtype=torch.bool, device=x.device)
            mask = ((causal & attention_mask.bool()[:, None, None]) | eye)[:, :, width - fed :]
        rotation, late = self._rotation(x, last_positions(attention_mask, fed)), None
        for number, block in enumerate(self.blocks):
            if number == self._entry(late_blocks):
                late = x
            last = self.complete and number == len(self.blocks) - 1
            extend = partial(cache.update, layer_idx=number)
            x = block.prefill(x, rotation, mask, extend, last_only=last_only and last)
        return (self.final_norm(x), late) if self.complete else (None, x)

    def _entry(self, late_blocks: int) -> int:
        """Number of the block that the late state enters."""
        return len(self.blocks) - late_blocks if late_blocks and self.complete else -1

    def _rotation(self, x: torch.Tensor, positions: torch.Tensor | None) -> Rotation:
        cos, sin = self.rotary(x, position_ids=positions)
        half = sin.shape[-1] // 2
        return cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, :, None]
