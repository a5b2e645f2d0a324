"""Which codes carry the gain of reinforcement learning: a sum over codes that estimates the rise of the mean reward.

Along the straight path from the policy before RL to the one after it, the mean reward rises by the sum over choices of
(after - before)(code | state) times the code's advantage there (the policy gradient theorem, integrated over the path; Sutton et al.
2000). Rollouts of all updates stand for the path, the chosen code's probability under the policy that sampled corrects for having been
chosen, and the rollout's own reward minus the mean of the others of its group stands for the advantage. It leaves out that training
need not follow the straight path, so the sum is compared with the rise that was measured.

A code has a positive part when it became more likely where it pays, or less likely where it costs.
"""

from __future__ import annotations

import numpy as np

from pipeline.explorer.corpus import Corpus
from pipeline.explorer.records import Estimate

Z95 = 1.96


def leave_one_out(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[R], reward minus the mean of the *other* rollouts of its group; rollouts alone in their group get that against all others."""
    sizes, sums = np.bincount(groups)[groups], np.bincount(groups, rewards)[groups]
    alone = sizes < 2
    others = np.where(alone, (rewards.sum() - rewards) / max(1, len(rewards) - 1), (sums - rewards) / np.maximum(sizes - 1, 1))
    return rewards - others


def contributions(before: np.ndarray, after: np.ndarray, sampled: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """[C], each choice's part: (after - before) / sampled of the code that was chosen, times its rollout's advantage."""
    return (after - before) / sampled * advantages


def estimate(parts: np.ndarray, groups: np.ndarray, rollouts: np.ndarray) -> Estimate:
    """The sum of parts [c] per rollout with its 95 % interval; groups are drawn independently, what is in a group is not.

    Args:
        groups: [c], the group of each part.
        rollouts: [G], how many rollouts each group has.
    """
    total = int(rollouts.sum())
    mean = float(parts.sum()) / total
    spread = np.bincount(groups, parts, minlength=len(rollouts)) - rollouts * mean
    half = Z95 * float(np.sqrt((spread**2).sum())) / total
    return Estimate(mean=mean, low=mean - half, high=mean + half)


def by_code(corpus: Corpus, parts: np.ndarray, choices: np.ndarray, rows: np.ndarray) -> tuple[list[Estimate], Estimate]:
    """The gain of each code, and of all.

    Args:
        parts: [c], of the tokens ``choices`` [c] of the corpus.
        rows: the rollouts that were read.
    """
    sizes = np.bincount(corpus.groups[rows], minlength=int(corpus.groups.max()) + 1)
    groups, codes = corpus.groups[corpus.rows[choices]], corpus.actions[choices]
    each = [estimate(parts[codes == code], groups[codes == code], sizes) for code in range(corpus.num_actions)]
    return each, estimate(parts, groups, sizes)


def by_key(keys: np.ndarray, codes: np.ndarray, parts: np.ndarray, shape: tuple[int, int], rollouts: int) -> np.ndarray:
    """[K, N], the same sums split by key."""
    return np.bincount(keys * shape[1] + codes, parts, minlength=shape[0] * shape[1]).reshape(shape) / rollouts
