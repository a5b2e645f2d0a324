"""The base LM as a supplier of features: one pass gives the last hidden state and an earlier one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from latent_control.bases.head_rule import head_rule
from latent_control.bases.loading import BASE, load_model
from latent_control.bases.support import require_supported
from latent_control.decoder_stack import Steady, decoder_blocks, decoder_of, position_ids
from latent_control.linear import linear
from latent_control.records import Features
from latent_control.text import config_ends, name_ends, saved_ends


class PassThrough(nn.Module):
    """Stands where a block was that nothing reads; ``wrap`` gives its input the form of the architecture's block
    outputs."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return self.wrap(hidden_states)


def load_base(
    base: str | Path | PreTrainedModel, *, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A frozen base LM from a folder, a hub id or a loaded model. Safetensors only: other weight files are pickles,
    which run code. Its generation config names all end tokens: its own, the config's and the tokenizer's (of a model
    that was loaded by the caller, the first two).

    Raises: ValueError: the folder does not exist or holds no causal LM, or one that latent actions cannot be put on
        (``bases/support.py``), or not all of its tensors and no others, or a tokenizer with more tokens than the
        embedding has rows; said from the files, before a weight is read.
    """
    if isinstance(base, PreTrainedModel):
        lm, ends = base, config_ends(base.config)
    else:
        lm = load_model(base, BASE, dtype=dtype, trust_remote_code=trust_remote_code)
        ends = saved_ends(base, trust_remote_code=trust_remote_code)
    if lm.generation_config is not None:
        name_ends(lm.generation_config, ends)
    require_supported(lm)
    return lm.eval().requires_grad_(False)


def positions_of(config: Any) -> tuple[int, int]:
    """(positions that there are, those up to which a row is read the same in every batch)"""
    sizes = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    positions = next((size for size in sizes if isinstance(size, int)), sys.maxsize)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    steady = sys.maxsize
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type", part.get("type")) in ("dynamic", "longrope"):
            original = part.get("original_max_position_embeddings")
            steady = min(steady, original or getattr(config, "original_max_position_embeddings", None) or positions)
    if getattr(config, "attn_temperature_tuning", None):  # Llama 4's, by column
        steady = min(steady, int(config.floor_scale) - 1)
    return positions, min(steady, getattr(config, "keep_window_size", None) or steady)  # Doge's, of all columns


class BaseLM(Steady):
    """Any decoder-only ``transformers`` LM, reached through ``get_decoder`` and ``get_output_embeddings``.

    ``late_blocks`` > 0 also captures the hidden state that enters the last ``late_blocks`` blocks.

    Raises:
        ValueError: ``lm`` has fewer blocks.
    """

    def __init__(self, lm: PreTrainedModel, late_blocks: int = 0) -> None:
        super().__init__()
        self.lm = lm
        self.late_blocks = late_blocks
        self.late_only = False
        self._late: torch.Tensor | None = None
        self._tuples = False
        self.head_rule = head_rule(lm, self.decoder)
        self.positions, self.steady_positions = positions_of(self.decoder.config)
        blocks = decoder_blocks(self.decoder)[1]
        if late_blocks > len(blocks):
            raise ValueError(
                f"{late_blocks} late blocks asked for, but the base LM has {len(blocks)} blocks: choose at most "
                f"{len(blocks)}"
            )
        if late_blocks:
            blocks[-late_blocks].register_forward_pre_hook(self._capture_late, with_kwargs=True)
        if 0 < late_blocks < len(blocks):
            blocks[-late_blocks - 1].register_forward_hook(self._see_output)

    def _capture_late(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._late = args[0] if args else kwargs["hidden_states"]

    def _see_output(self, _: nn.Module, __: Any, output: Any) -> None:
        self._tuples = isinstance(output, tuple)

    def _like_output(self, hidden_states: torch.Tensor) -> Any:
        """``hidden_states`` as a block of this architecture returns it: bare, or first in a tuple (Falcon, Bloom,
        GPT-J)."""
        return (hidden_states,) if self._tuples else hidden_states

    @property
    def decoder(self) -> PreTrainedModel:
        """The stack of blocks without the language head."""
        return decoder_of(self.lm)

    @property
    def width(self) -> int:
        """D."""
        return self.decoder.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's parameters, which is the features' dtype."""
        return self.lm.dtype

    def drop_late_blocks(self) -> None:
        """Free the last ``late_blocks`` blocks: from now on only ``late`` is supplied, at less cost. All blocks stay
        where ``late`` is what enters the first one."""
        assert self.late_blocks, "nothing reads the late state"
        blocks = decoder_blocks(self.decoder)[1]
        if self.late_blocks == len(blocks):
            return
        for index in range(len(blocks) - self.late_blocks, len(blocks)):
            hooks = blocks[index]._forward_pre_hooks, blocks[index]._forward_pre_hooks_with_kwargs
            blocks[index] = PassThrough(self._like_output)
            blocks[index]._forward_pre_hooks, blocks[index]._forward_pre_hooks_with_kwargs = hooks
        self.lm.set_output_embeddings(None)
        self.late_only = True

    def new_cache(self) -> Cache:
        """An empty key-value cache."""
        return DynamicCache(config=self.decoder.config)

    def require_steady(self, length: int) -> None:
        """``ValueError`` where rows of ``length`` tokens would change how shorter ones in their batch are read.

        Such bases choose rotary frequencies, scales or what is attended to by the columns of a batch: a row would
        depend on its company, and on what is cached.
        """
        if length > self.steady_positions:
            kind = "positions or scales that change with the longest row of a batch"
            raise ValueError(
                f"rows of {length} tokens, but {type(self.lm).__name__} has {kind} beyond {self.steady_positions}: "
                "keep prompts and responses within that (task.max_prompt_tokens, rollout.max_new_tokens, max_length)"
            )

    def features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        positions: torch.Tensor | None = None,
    ) -> Features:
        """Features of ``input_ids`` [B, T]; gradients flow only when a base parameter asks for them.

        Raises:
            ValueError: rows are longer than ``require_steady`` allows.
        """
        self.require_steady(input_ids.shape[1])
        trainable = torch.is_grad_enabled() and any(p.requires_grad for p in self.lm.parameters())
        if positions is None:
            positions = position_ids(attention_mask)
        with torch.set_grad_enabled(trainable):
            output = self.decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        late, self._late = self._late, None
        return Features(final=None if self.late_only else output.last_hidden_state, late=late)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Language head of states [..., D] -> [..., V], scaled and soft-capped where the architecture does so."""
        head = self.lm.get_output_embeddings()
        logits = linear(states, head.weight, head.bias) if type(head) is nn.Linear else head(states)
        return self.head_rule(logits)
