"""Cached decoding: the policy picks a code, the language world model emits that code's most likely token."""

from __future__ import annotations

from collections.abc import Callable

import torch

from latent_control.base_lm import BaseLM
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.engine import Engine
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.decoding.static_engine import StaticEngine
from latent_control.records import Generation


@torch.no_grad()
def generate(
    base: BaseLM,
    actor: ActionDecoder,
    params: SamplingParams,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    refresh: Callable[[], int] | None = None,
    static: bool = False,
    tree: PrefixTree | None = None,
) -> Generation:
    """Decode ``params.repeats`` rollouts of each prompt [B, P], padded on either side as ``attention_mask`` says.

    ``refresh`` is asked before every step for the policy's version; it may have changed the policy's weights in place.
    ``tree`` holds what earlier calls with this base have read (for actors that read the same of its states), and takes
    what this one reads. ``static`` decodes on tensors of fixed size and, on a GPU, by a CUDA graph (``StaticEngine``).

    Raises:
        ValueError: a setting does not fit the rows, or ``static`` with a base that is not Llama-shaped.
    """
    kind = StaticEngine if static else Engine
    return kind(base, actor, params, input_ids, attention_mask, refresh=refresh, tree=tree).run()
