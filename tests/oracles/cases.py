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
        group=group,
        discount=float(rng.choice([1.0, 0.9])),
        gae_lambda=float(rng.choice([1.0, 0.95])),
        clip_low=0.2,
        clip_high=float(rng.choice([0.2, 0.28])),
    )


SEEDS = range(15)


def distributions(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [N] of a policy and of its reference over all of 12 actions."""
    logits: Any = np.random.default_rng([seed, 1]).normal(0, 0.4, (2, 12))
    policy, reference = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return policy, reference
