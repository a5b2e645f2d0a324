"""Random batches on which peers' losses and ours are compared; made from a seed, so that files hold answers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Case:
    """G rollouts of each of P prompts, of up to T actions."""

    rewards: np.ndarray
    """[B] float64"""
    baselines: np.ndarray
    """[B], one for each prompt"""
    mask: np.ndarray
    """[B, T] bool, each row one run from its beginning"""
    values: np.ndarray
    old: np.ndarray
    """[B, T], log-probabilities of the actions under the behaviour policy"""
    new: np.ndarray
    reference: np.ndarray
    sampler: np.ndarray
    """[B, T], as ``old`` would be if the workers computed it otherwise"""
    group: int
    discount: float
    gae_lambda: float
    clip_low: float
    clip_high: float


def case(seed: int) -> Case:
    """Rewards of many kinds: marks, parts, large ones; some groups have no spread."""
    rng = np.random.default_rng(seed)
    prompts, group, length = int(rng.integers(1, 6)), int(rng.integers(2, 6)), int(rng.integers(1, 9))
    rows = prompts * group
    kinds = (rng.integers(0, 2, rows).astype(float), rng.normal(0, 1, rows), 100 + rng.integers(0, 3, rows) / 4)
    rewards = kinds[seed % 3]
    rewards[:group] = rewards[0]
    lengths = rng.integers(1, length + 1, rows)
    old = -rng.exponential(1.0, (rows, length))
    return Case(
        rewards=rewards,
        baselines=np.repeat(rng.normal(0, 1, prompts), group),
        mask=np.arange(length) < lengths[:, None],
        values=rng.normal(0, 1, (rows, length)),
        old=old,
        new=old + rng.normal(0, 0.3, (rows, length)),
        reference=old + rng.normal(0, 0.3, (rows, length)),
        sampler=old + np.random.default_rng([seed, 2]).normal(0, 0.5, (rows, length)),
        group=group,
        discount=float(rng.choice([1.0, 0.9])),
        gae_lambda=float(rng.choice([1.0, 0.95])),
        clip_low=0.2,
        clip_high=float(rng.choice([0.2, 0.28])),
    )


SEEDS = range(15)
CAP = 1.3
"""At which importance weights are truncated."""
LENGTHS = (1, 79, 80, 81, 90, 99, 100)
"""Of responses that may have 100 tokens, the last 20 of them at a price."""
LIMIT, WINDOW = 100, 20
RECIPES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_mean": "token", "clip_low": 0.2, "clip_high": 0.28},
    "dr_grpo": {"loss_mean": "constant", "clip_low": 0.2, "clip_high": 0.2},
    "gspo": {"loss_mean": "sequence", "ratio": "sequence", "clip_low": 0.02, "clip_high": 0.04},
    "cispo": {"loss_mean": "token", "surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.2},
    "truncated": {"loss_mean": "token", "clip_low": 0.2, "clip_high": 0.2},
}
"""What peers and we compute the loss with; the clips of gspo and cispo are such that they bite on these numbers.
"truncated" weighs actions by min(CAP, old / sampler)."""


def distributions(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [N] of a policy and of its reference over all of 12 actions."""
    logits: Any = np.random.default_rng([seed, 1]).normal(0, 0.4, (2, 12))
    policy, reference = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return policy, reference
