"""Which base LMs latent actions can be put on: decided here, from a model's classes and config alone, so that a model
without weights can be asked.

The engine keeps keys and values of past tokens by slot and column, and the stacks beside a base are blocks like its
last ones, fed with hidden states. What a base does otherwise is named, not its architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from latent_control.bases.head_rule import head_rule
from latent_control.decoder_stack import decoder_blocks, decoder_of

_KEYS_AND_VALUES = {DynamicLayer, DynamicSlidingWindowLayer}
_NEEDED = ("inputs_embeds", "attention_mask", "past_key_values")


def require_supported(lm: PreTrainedModel) -> None:
    """``ValueError`` with the reason why latent actions cannot be put on ``lm``, whose weights may be absent (meta)."""
    if reason := next(_reasons(lm), None):
        raise ValueError(
            f"{type(lm).__name__} is not supported: {reason}; take a decoder-only language model whose blocks attend "
            "to keys and values of past tokens (docs/base-models.md lists those that were tried)"
        )


def _reasons(lm: PreTrainedModel) -> Iterator[str]:
    decoder = decoder_of(lm)
    config: Any = decoder.config
    if lm.config.is_encoder_decoder or any(hasattr(config, name) for name in ("decoder_layers", "num_decoder_layers")):
        yield "it is an encoder-decoder, or the decoder of one"
    yield from _cache_reasons(config)
    arguments = signature(decoder.forward).parameters
    if lacking := [name for name in _NEEDED if name not in arguments]:
        yield f"its blocks are not called with {' and '.join(lacking)}, so nothing of past tokens can be kept by row"
    try:
        decoder_blocks(decoder)
    except ValueError as error:
        yield str(error)
    if getattr(config, "hidden_size_per_layer_input", None):
        yield "each of its blocks reads the token ids again (hidden_size_per_layer_input), not hidden states alone"
    if not all(getattr(part, "is_causal", True) for part in (config, *decoder.modules()) if not _crossed(part)):
        yield "its blocks attend to later tokens, too (is_causal, use_bidirectional_attention), as encoders do"
    if getattr(config, "is_moe", False) is True:  # Doge's, whose comment in transformers says so
        yield "its routers mix the scores of different tokens, later ones and those of other rows (is_moe)"
    yield from _head_reasons(lm, decoder)


def _crossed(part: Any) -> bool:
    """Whether it attends to another sequence, which decoders without an encoder never do."""
    return bool(getattr(part, "is_cross_attention", False))


def _cache_reasons(config: Any) -> Iterator[str]:
    """What its blocks keep of past tokens besides keys and values per token."""
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
        yield f"transformers has no cache for it ({type(error).__name__}: {error})"
        return
    kinds = {type(layer).__name__: layer for layer in layers if type(layer) not in _KEYS_AND_VALUES}
    for name, layer in kinds.items():
        if hasattr(layer, "recurrent_states"):
            yield f"some of its blocks keep a recurrent or convolutional state ({name}), which has no column per token"
        elif name == "DummyLayer":
            yield "some of its blocks keep no keys and values but read those of other blocks"
        else:
            yield f"some of its blocks keep more than keys and values of each token ({name})"


def _head_reasons(lm: PreTrainedModel, decoder: PreTrainedModel) -> Iterator[str]:
    head, width = lm.get_output_embeddings(), decoder.config.hidden_size
    if head is None or head.weight.shape[1] != width:
        found = "none" if head is None else f"one of width {head.weight.shape[1]}"
        yield f"it needs a language head as wide as its blocks ({width}), but has {found}"
        return
    known = {id(parameter) for module in (decoder, head) for parameter in module.parameters()}
    rest = [name for name, parameter in lm.named_parameters() if id(parameter) not in known]
    if rest and lm.config is decoder.config:
        yield f"it does more to the last states than one language head ({rest[0]})"
    try:
        head_rule(lm, decoder)
    except ValueError as error:
        yield str(error)
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:
        if lm.device.type != "meta" or not isinstance(error, RuntimeError):  # some read the token itself
            yield f"its pass from blocks to logits cannot be followed ({type(error).__name__}: {error})"
