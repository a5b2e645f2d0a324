"""Sums of the parts that choices have in what reinforcement learning gained (``path``), with their intervals."""

from __future__ import annotations

import numpy as np

from pipeline.evaluation.statistics import centred
from pipeline.pages.explorer.records import IntervalEstimate

Z95 = 1.96


def leave_one_out(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[R], reward minus the mean of the *other* rollouts of its group; 0 for a rollout alone in its group, which tells
    nothing."""
    sizes = np.bincount(groups)[groups]
    return centred(rewards, groups) * sizes / np.maximum(sizes - 1, 1)


def estimate(parts: np.ndarray, groups: np.ndarray, rollouts: np.ndarray) -> IntervalEstimate:
    """The sum of parts [c] per rollout with its 95 % interval; groups are drawn independently, what is in a group is
    not.

    Args:
        groups: [c], the group of each part.
        rollouts: [G], how many rollouts each group has.
    """
    total = int(rollouts.sum())
    mean = float(parts.sum()) / total
    spread = np.bincount(groups, parts, minlength=len(rollouts)) - rollouts * mean
    half = Z95 * float(np.sqrt((spread**2).sum())) / total
    return IntervalEstimate(mean=mean, low=mean - half, high=mean + half)


def by_code(
    codes: np.ndarray, parts: np.ndarray, groups: np.ndarray, rollouts: np.ndarray, num_actions: int
) -> list[IntervalEstimate]:
    """``estimate`` for each code: those of all choices add up to the whole."""
    return [estimate(parts[codes == code], groups[codes == code], rollouts) for code in range(num_actions)]


def by_key(keys: np.ndarray, codes: np.ndarray, parts: np.ndarray, shape: tuple[int, int], rollouts: int) -> np.ndarray:
    """[K, N], the same sums split by key."""
    return np.bincount(keys * shape[1] + codes, parts, minlength=shape[0] * shape[1]).reshape(shape) / rollouts
