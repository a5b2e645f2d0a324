"""Cached decoding: the policy picks a code, the language world model emits that code's most likely token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from latent_control.base_lm import BaseLM
from latent_control.decoding.action_decoder import Actor
from latent_control.decoding.engine import Engine, Sampling
from latent_control.decoding.guide import Guide, Watch
from latent_control.decoding.static_engine import StaticEngine
from latent_control.distributions import rollout_seed
from latent_control.records import Generation


def left_pad(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pad_token: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows with all padding moved to the left and common padding cut off."""
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    if bool((attention_mask.sum(1) == 0).any()):
        raise ValueError("a row of attention_mask is all zero: every prompt needs at least one token")
    order = attention_mask.bool().int().argsort(dim=1, stable=True)
    ids, mask = input_ids.gather(1, order), attention_mask.gather(1, order).long()
    width = int(mask.sum(1).max())
    return ids[:, -width:].masked_fill(mask[:, -width:] == 0, pad_token), mask[:, -width:]


def row_limits(max_new_tokens: int | Sequence[int], rows: int, device: torch.device) -> torch.Tensor:
    """[rows] limits from one number or one per row."""
    limits = torch.as_tensor(max_new_tokens, device=device).reshape(-1)
    limits = limits.expand(rows) if len(limits) == 1 else limits
    if len(limits) != rows or rows == 0 or int(limits.min()) < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens!r}: need one positive number, or one for each of the {rows} rows"
        )
    return limits


def special_tokens(lm: PreTrainedModel, stop_token: int | list[int] | None) -> tuple[tuple[int, ...], int]:
    """(end tokens, pad token) of a base LM; chat models have several. ``stop_token`` -1 switches them off."""
    config = lm.generation_config or lm.config
    ends = config.eos_token_id if stop_token is None else stop_token
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    return tuple(end for end in ends if end >= 0), pad


@torch.no_grad()
def generate(
    base: BaseLM,
    actor: Actor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    stop_token: int | list[int] | None = None,
    repeats: int = 1,
    row_seeds: Sequence[int] | None = None,
    return_features: bool = False,
    refresh: Callable[[], int] | None = None,
    static: bool = False,
    aliases: int | None = None,
    guide: Guide | None = None,
    watch: Watch | None = None,
) -> Generation:
    """``LatentActionLM.generate`` for any actor; see there for the arguments.

    ``refresh`` is asked before every step for the policy's version; it may have changed the policy's weights in place.
    ``aliases``: also find, among so many most likely codes, those that would have emitted the same token
    (``Generation.events``). ``guide``: codes that are forced or allowed; ``watch`` is told of every step and may end
    rows. ``static`` decodes on tensors of fixed size and, on a GPU, by a CUDA graph (``StaticEngine``).
    """
    rows = len(input_ids) * repeats
    limits = row_limits(max_new_tokens, rows, input_ids.device)
    if temperature < 0 or (top_k is not None and top_k < 1) or (batch_size is not None and batch_size < 1):
        raise ValueError(
            f"temperature={temperature}, top_k={top_k}, batch_size={batch_size}: need temperature >= 0, top_k >= 1, "
            "batch_size >= 1"
        )
    if row_seeds is None:
        start = int(torch.randint(2**31, ())) if seed is None else seed
        row_seeds = [rollout_seed(start, row) for row in range(rows)]
    if len(row_seeds) != rows:
        raise ValueError(f"{len(row_seeds)} row_seeds given: need one for each of the {rows} rows")
    stops, pad = special_tokens(base.lm, stop_token)
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        stop_tokens=stops,
        pad_token=pad,
        keep_features=return_features,
        aliases=aliases,
        guide=guide,
        watch=watch,
    )
    ids, mask = left_pad(input_ids, attention_mask, pad)
    kind = StaticEngine if static else Engine
    engine = kind(
        base, actor, sampling, ids, mask, limits, row_seeds, repeats=repeats, slots=batch_size or rows, refresh=refresh
    )
    return engine.run()
