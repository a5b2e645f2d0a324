"""Small stacks of decoder blocks of the base LM's own architecture: the inverse dynamics model and the latent
policy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from inspect import signature
from typing import Any, Self

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
    raise ValueError(f"{type(decoder).__name__} has no list of {depth} decoder blocks that are run one after another")


def position_ids(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Positions [B, T] that count real tokens only, so padding on either side changes nothing."""
    return None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)


def last_positions(attention_mask: torch.Tensor, count: int) -> torch.Tensor:
    """``position_ids`` of the last ``count`` columns, [B, count]."""
    positions = position_ids(attention_mask)
    assert positions is not None
    return positions[:, -count:]


def decoder_of(lm: PreTrainedModel) -> PreTrainedModel:
    """The stack of blocks of ``lm`` without its language head."""
    found = lm.get_decoder()
    if isinstance(found, PreTrainedModel) and found is not lm:
        return found
    # Some answer with themselves (Llama 4) or with their head (ModernBERT).
    return next((child for child in lm.children() if isinstance(child, PreTrainedModel)), lm)


def _shorten(config: PreTrainedConfig, depths: Sequence[int]) -> None:
    """Make a base's config that of the blocks that lie at ``depths`` of it."""
    before, said = config.num_hidden_layers, config.to_dict()
    apart = {int(depth): own for depth, own in (said.pop("per_layer_config", None) or {}).items()}
    if apart:
        config.per_layer_config = None
    for name, value in said.items():
        named = name.endswith(("_types", "_type", "_layers", "_pattern"))
        if isinstance(value, list) and len(value) == before and named:
            setattr(config, name, [getattr(config, name)[depth] for depth in depths])
    config.num_hidden_layers = len(depths)
    if apart:
        config.per_layer_config = {number: apart[depth] for number, depth in enumerate(depths) if depth in apart}


def _nature(block: nn.Module) -> list[object]:
    """What a block is but for its weights and its number: classes, shapes and settings of its modules."""
    shapes = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    settings = [
        {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | None) and key not in ("layer_idx", "training") and key[0] != "_"
        }
        for module in block.modules()
    ]
    return [type(block), shapes, [type(module) for module in block.modules()], settings]


class Steady(nn.Module):
    """Draws nothing at random, whatever mode it is set to: no dropout, no noise of routers. The sampler's and the
    learner's log-probabilities must agree."""

    def train(self, mode: bool = True) -> Self:
        """Stays as for evaluation; gradients flow all the same."""
        return super().train(False)


class DecoderStack(Steady):
    """``n`` causal decoder blocks + the architecture's final norm + a bias-free linear layer D -> outputs.

    The blocks are the base's own classes built from the base's own config as its last ones (its first one again where
    there are more), fed with hidden states in place of embeddings.
    """

    stateless = False
    """A position's logits depend on the states before it, too."""

    def __init__(self, decoder: PreTrainedModel, blocks: int, outputs: int) -> None:
        super().__init__()
        self.state_width: int = decoder.config.hidden_size
        if blocks < 1:
            raise ValueError(f"{blocks} blocks asked for: choose at least 1")
        config = copy.deepcopy(decoder.config)
        depths = [max(0, config.num_hidden_layers - blocks + number) for number in range(blocks)]
        config.vocab_size, config.pad_token_id = 1, None if config.pad_token_id is None else 0
        whole = copy.deepcopy(config)
        _shorten(config, depths)
        self.decoder = type(decoder)(config)
        self._build_at_depths(decoder, whole, depths)
        self._remove_embeddings()
        self.head = nn.Linear(config.hidden_size, outputs, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        self.eval()
        self._fed: torch.Tensor | None = None
        # Whatever an architecture does to embeddings before its first block (scale, norm, add positions) is not for us.
        decoder_blocks(self.decoder)[1][0].register_forward_pre_hook(self._feed, with_kwargs=True)

    def _build_at_depths(self, decoder: PreTrainedModel, config: PreTrainedConfig, depths: Sequence[int]) -> None:
        """Build blocks again that the base has otherwise at ``depths``: a mixture of experts, another scale."""
        own, theirs = decoder_blocks(self.decoder)[1], decoder_blocks(decoder)[1]
        for number, depth in enumerate(depths):
            kind = type(theirs[depth])
            if _nature(own[number]) == _nature(theirs[depth]) or "layer_idx" not in signature(kind).parameters:
                continue
            own[number] = kind(config, layer_idx=depth)
            for module in own[number].modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx += number - depth  # its place in the cache
        self.decoder.init_weights()  # of what is new; the rest has been

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

    def _feed(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        assert self._fed is not None, "blocks are called through hidden"
        if args:
            return (self._fed, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._fed}

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
        self._fed = states = states.to(self.head.weight.dtype)
        try:
            # What is embedded is not read; some architectures change it in place (CTRL).
            return self.decoder(
                inputs_embeds=torch.zeros_like(states),
                attention_mask=attention_mask,
                position_ids=position_ids(attention_mask) if positions is None else positions,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        finally:
            self._fed = None

    def forward(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, outputs] of ``states`` [B, T, D]."""
        return self.head(self.hidden(states, attention_mask, cache, positions))

    def logits_at(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[M, outputs] at the positions ``mask`` [B, T] of states [B, T, D]: at token level, those of all positions
        would be B x T x V numbers."""
        return self.head(self.hidden(states)[mask])
