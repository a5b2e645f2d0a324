"""The base LM as a supplier of features: one pass gives the last hidden state and an earlier one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from latent_control.records import Features
from latent_control.tower import decoder_blocks, position_ids


class PassThrough(nn.Module):
    """Stands where a block was that nothing reads."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class BaseLM(nn.Module):
    """Any decoder-only ``transformers`` LM, reached through ``get_decoder`` and ``get_output_embeddings``.

    ``late_blocks`` > 0 also captures the hidden state that enters the last ``late_blocks`` blocks.
    """

    def __init__(self, lm: PreTrainedModel, late_blocks: int = 0) -> None:
        super().__init__()
        self.lm = lm
        self.late_blocks = late_blocks
        self.late_only = False
        self._late: torch.Tensor | None = None
        blocks = decoder_blocks(self.decoder)[1]
        if late_blocks >= len(blocks):
            raise ValueError(
                f"{late_blocks} late blocks asked for, but the base LM has {len(blocks)} blocks: choose at most {len(blocks) - 1}"
            )
        if late_blocks:
            blocks[-late_blocks].register_forward_pre_hook(self._capture_late, with_kwargs=True)

    def _capture_late(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._late = args[0] if args else kwargs["hidden_states"]

    @property
    def decoder(self) -> PreTrainedModel:
        """The stack of blocks without the language head."""
        return self.lm.get_decoder()

    @property
    def width(self) -> int:
        """D."""
        return self.decoder.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's parameters, which is the features' dtype."""
        return self.lm.dtype

    def drop_late_blocks(self) -> None:
        """Free the last ``late_blocks`` blocks and the language head: from now on only ``late`` is supplied, at less cost."""
        assert self.late_blocks, "nothing reads the late state"
        blocks = decoder_blocks(self.decoder)[1]
        for index in range(len(blocks) - self.late_blocks, len(blocks)):
            hooks = blocks[index]._forward_pre_hooks, blocks[index]._forward_pre_hooks_with_kwargs
            blocks[index] = PassThrough()
            blocks[index]._forward_pre_hooks, blocks[index]._forward_pre_hooks_with_kwargs = hooks
        self.late_only = True

    def new_cache(self) -> Cache:
        """An empty key-value cache."""
        return DynamicCache(config=self.decoder.config)

    def features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        positions: torch.Tensor | None = None,
    ) -> Features:
        """Features of ``input_ids`` [B, T]; gradients flow only when a base parameter asks for them."""
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
        """Language head of states [..., D] -> [..., V], soft-capped where the architecture says so (Gemma 2)."""
        logits = self.lm.get_output_embeddings()(states)
        cap = getattr(self.decoder.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap
