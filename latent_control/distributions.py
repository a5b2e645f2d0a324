"""The distribution codes (and baseline tokens) are sampled from, in one place for sampler and learner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def action_log_probs(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    keep: torch.Tensor | None = None,
    support: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities [..., N] of logits [..., N] after temperature and top-k truncation, in float32.

    ``support`` [..., k]: the actions to normalise over in place of the top k of ``logits``: of what another policy
    sampled from its own top k, since only over the same set ratios of both have the mean 1. Where that set was not
    stored, ``keep`` [...] names an action that stays in the top k, so that its ratio stays finite. Temperature 0
    (greedy) is the argmax's business: here it counts as 1.
    """
    scaled = logits.float() if temperature in (0, 1) else logits.float() / temperature
    if support is None:
        support = likeliest(logits, top_k)
    else:
        keep = None
    if support is not None:
        kept = torch.zeros_like(scaled, dtype=torch.bool).scatter_(-1, support, True)
        if keep is not None:
            kept.scatter_(-1, keep[..., None], True)
        scaled = scaled.masked_fill(~kept, float("-inf"))
    return torch.log_softmax(scaled, dim=-1)


def likeliest(logits: torch.Tensor, top_k: int | None) -> torch.Tensor | None:
    """The ``top_k`` actions [..., k] of logits [..., N] that can be sampled; ``None`` where all can."""
    return None if top_k is None or top_k >= logits.shape[-1] else logits.topk(top_k, dim=-1).indices


def sample_actions(log_probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse-transform sampling: log-probabilities [B, N] and uniforms [B] in [0, 1) -> actions [B].

    A row's action depends on its own uniform alone, so a rollout is the same in any batch.
    """
    cumulative = log_probs.double().exp().cumsum(-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    return (cumulative <= threshold).sum(-1).clamp(max=log_probs.shape[-1] - 1)


def rollout_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part, e.g. (run seed, prompt index, place in the group)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def uniform_streams(seeds: Sequence[int], length: int) -> torch.Tensor:
    """[B, length] float64 uniforms, row b drawn from its own stream ``seeds[b]``."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(length) for seed in seeds]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, length, dtype=torch.float64)
