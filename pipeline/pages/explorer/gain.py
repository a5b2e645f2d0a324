"""Sums of the parts that choices have in what reinforcement learning gained (``path``), with their intervals."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from pipeline.evaluation.outcome_file import read_outcomes
from pipeline.evaluation.statistics import centred, paired_difference, student
from pipeline.pages.explorer.records import IntervalEstimate
from pipeline.runs.layout import OUTCOMES


def evaluated(run_dir: Path, before: str, after: str, seed: int) -> tuple[IntervalEstimate, int] | None:
    """What the evaluation says of the gain: mean reward of variant ``after`` minus that of ``before`` over the sampled
    rollouts of the same held-out prompts, and how many these are; ``None`` where it says nothing. By the run's ``seed``
    and in the evaluation's order: where the reward is success, it is the evaluation's own difference and interval."""
    path = run_dir / OUTCOMES
    if not path.is_file():
        return None
    rewards: dict[str, dict[str, list[float]]] = {before: defaultdict(list), after: defaultdict(list)}
    for row in read_outcomes(path):
        if row.variant in rewards and row.mode == "sampled" and row.reward is not None:
            rewards[row.variant][row.prompt_id].append(row.reward)
    common = [prompt for prompt in rewards[before] if prompt in rewards[after]]
    if not common:
        return None
    first, last = (np.array([np.mean(rewards[name][prompt]) for prompt in common]) for name in (before, after))
    found = paired_difference(last, first, seed)
    return IntervalEstimate(**found), len(common)


def leave_one_out(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[R], reward minus the mean of the *other* rollouts of its group; 0 for a rollout alone in its group, which tells
    nothing."""
    sizes = np.bincount(groups)[groups]
    return centred(rewards, groups) * sizes / np.maximum(sizes - 1, 1)


def estimate(parts: np.ndarray, groups: np.ndarray, rollouts: np.ndarray) -> IntervalEstimate:
    """The sum of parts [c] per rollout with Student's 95 % interval; groups are drawn independently, what is in a group
    is not.

    Args:
        groups: [c], the group of each part.
        rollouts: [G], how many rollouts each group has.
    """
    total = int(rollouts.sum())
    mean = float(parts.sum()) / total
    spread = np.bincount(groups, parts, minlength=len(rollouts)) - rollouts * mean
    freedom = max(1, len(rollouts) - 1)
    half = student(freedom) * float(np.sqrt((spread**2).sum() * len(rollouts) / freedom)) / total
    return IntervalEstimate(mean=mean, low=mean - half, high=mean + half)


def by_code(
    codes: np.ndarray, parts: np.ndarray, groups: np.ndarray, rollouts: np.ndarray, num_actions: int
) -> list[IntervalEstimate]:
    """``estimate`` for each code: those of all choices add up to the whole."""
    return [estimate(parts[codes == code], groups[codes == code], rollouts) for code in range(num_actions)]


def by_key(keys: np.ndarray, codes: np.ndarray, parts: np.ndarray, shape: tuple[int, int], rollouts: int) -> np.ndarray:
    """[K, N], the same sums split by key."""
    return np.bincount(keys * shape[1] + codes, parts, minlength=shape[0] * shape[1]).reshape(shape) / rollouts
