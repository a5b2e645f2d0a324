"""Small stacks of decoder blocks of the base LM's own architecture: the inverse dynamics model and the latent
policy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel


def decoder_blocks(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a decoder's blocks, whatever the architecture calls them (``layers``, ``h``, ...).

    Raises:
        ValueError: the decoder has no module list of ``config.num_hidden_layers`` blocks.
    """
    depth = decoder.config.num_hidden_layers
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return name, child
    raise ValueError(
        f"{type(decoder).__name__} has no list of {depth} decoder blocks; only decoder-only language "
        "models are supported"
    )


def position_ids(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Positions [B, T] that count real tokens only, so padding on either side changes nothing."""
    return None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _shorten(config: PreTrainedConfig, blocks: int) -> None:
    """Make a base's config that of its last ``blocks`` blocks, fed with hidden states, without randomness."""
    depth = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth and (name == "layer_types" or name.endswith("_layers")):
            setattr(config, name, getattr(config, name)[-blocks:])
        # The sampler's and the learner's log-probabilities must agree, whatever mode a stack is in.
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    if hasattr(config, "embedding_multiplier"):  # Granite scales whatever it is fed
        config.embedding_multiplier = 1.0
    config.num_hidden_layers = blocks


class DecoderStack(nn.Module):
    """``n`` causal decoder blocks + the architecture's final norm + a bias-free linear layer D -> outputs.

    The blocks are the base's own class built from the base's own config, fed with hidden states in place of embeddings.
    """

    def __init__(self, decoder: PreTrainedModel, blocks: int, outputs: int) -> None:
        super().__init__()
        config = copy.deepcopy(decoder.config)
        depth = config.num_hidden_layers
        if not 1 <= blocks <= depth:
            raise ValueError(f"{blocks} blocks asked for, but the base LM has {depth}: choose 1 to {depth}")
        _shorten(config, blocks)
        config.vocab_size, config.pad_token_id = 1, None
        self.decoder = type(decoder)(config)
        self._remove_embeddings()
        self.head = nn.Linear(config.hidden_size, outputs, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def _remove_embeddings(self) -> None:
        """Drop token embeddings; positions learned by the base are already in its hidden states, so those become frozen
        zeros."""
        token_embeddings = self.decoder.get_input_embeddings()
        for name, module in list(self.decoder.named_children()):
            if module is token_embeddings:
                setattr(self.decoder, name, None)
            elif isinstance(module, nn.Embedding):
                nn.init.zeros_(module.weight).requires_grad_(False)
            elif name == "word_embeddings_layernorm":  # Bloom's blocks start after it
                setattr(self.decoder, name, nn.Identity())

    def start_from(self, decoder: PreTrainedModel) -> None:
        """Copy the weights of ``decoder``'s last blocks and final norm."""
        name, own = decoder_blocks(self.decoder)
        theirs = decoder_blocks(decoder)[1]
        for mine, source in zip(own, theirs[-len(own) :], strict=True):
            mine.load_state_dict(source.state_dict())
        for child_name, child in self.decoder.named_children():
            if child_name != name and not isinstance(child, nn.Embedding) and child.state_dict():
                child.load_state_dict(getattr(decoder, child_name).state_dict())

    def trainable(self) -> list[nn.Parameter]:
        """Parameters training may change: all but the zeroed position embeddings and whatever is frozen."""
        fixed = {id(p) for module in self.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
        return [p for p in self.parameters() if id(p) not in fixed]

    def new_cache(self) -> Cache:
        """An empty key-value cache for these blocks, which may attend otherwise than the base's first ones."""
        return DynamicCache(config=self.decoder.config)

    def hidden(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States [B, T, D] before the head; ``cache`` is extended in place."""
        arguments: dict[str, Any] = {
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        arguments["position_ids"] = position_ids(attention_mask) if positions is None else positions
        # A copy: some blocks scale what they are fed in place (CTRL), and others read these states too.
        states = states.to(self.head.weight.dtype, copy=True)
        return self.decoder(inputs_embeds=states, **arguments).last_hidden_state

    def forward(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, outputs] of ``states`` [B, T, D]."""
        return self.head(self.hidden(states, attention_mask, cache, positions))
