"""Numbers from outcomes, as free functions over numpy arrays: intervals, pass@k, diversity, gaps. Axes: P prompts, S
samples per prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

DRAWS = 2000
"""Bootstrap resamples."""


def wilson(successes: float, total: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of a success rate (Wilson, 1927).

    ``successes`` may be a sum of per-prompt means; then the interval is on the wide side.
    """
    rate, spread = successes / total, z * z / total
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(max(0.0, rate * (1 - rate)) / total + spread / (4 * total)) / (1 + spread)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def bootstrap_means(values: np.ndarray, seed: int, draws: int = DRAWS) -> np.ndarray:
    """Means [draws] of resamples of ``values`` [P] with replacement (Efron, 1979)."""
    return np.random.default_rng(seed).choice(values, (draws, len(values))).mean(1)


def centred(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[R], values minus the mean of their group ([R] int); exactly 0 where a group's are equal.

    The mean is taken of what lies above the group's lowest: that of equal numbers rounds, that of zeros does not.
    """
    lowest = np.full(int(groups.max(initial=-1)) + 1, np.inf)
    np.minimum.at(lowest, groups, values)
    above = values - lowest[groups]
    return np.asarray(above - (np.bincount(groups, above) / np.maximum(np.bincount(groups), 1))[groups])


def student(freedom: float) -> float:
    """97.5 % quantile of Student's t distribution: half of a 95 % interval, in standard errors."""
    from scipy.special import stdtrit  # imports 0.8 s sooner than scipy.stats

    return float(stdtrit(freedom, 0.975))


def interval(draws: np.ndarray) -> list[float]:
    """The middle 95 % of bootstrap draws."""
    return [float(q) for q in np.quantile(draws, [0.025, 0.975])]


def paired_difference(better: np.ndarray, worse: np.ndarray, seed: int, draws: int = DRAWS) -> dict[str, float]:
    """Mean of ``better - worse`` over the same prompts [P] with its 95 % bootstrap interval."""
    difference = better - worse
    low, high = interval(bootstrap_means(difference, seed, draws))
    return {"mean": float(difference.mean()), "low": low, "high": high}


def pass_at_k(successes: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Unbiased pass@k of each prompt, 1 - C(n-c, k) / C(n, k) (Chen et al., 2021), [P].

    Args:
        successes: c, how many of its ``samples`` (n) solve each prompt, [P].

    Raises:
        ValueError: k is more than ``samples``.
    """
    if not 1 <= k <= samples:
        raise ValueError(
            f"pass@{k} needs at least {k} samples per prompt, there are {samples}; set "
            f"evaluation.samples_per_prompt: {k}"
        )
    misses = {c: math.comb(samples - c, k) / math.comb(samples, k) for c in range(samples + 1)}
    return np.array([1.0 - misses[int(c)] for c in successes])


def distinct_n(responses: Sequence[str], n: int) -> float | None:
    """Different n-grams of words over all n-grams of the responses to a prompt (Li et al., 2016); ``None`` when there
    is none."""
    grams = [gram for words in map(str.split, responses) for gram in zip(*(words[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else None


def differing_pairs(responses: Sequence[str]) -> float:
    """Share of the pairs of responses (2 or more) that differ. Unlike distinct-n its mean does not depend on how many
    there are."""
    total = math.comb(len(responses), 2)
    return 1.0 - sum(math.comb(count, 2) for count in Counter(responses).values()) / total


def mean_pairwise_cosine(vectors: np.ndarray) -> float:
    """Mean cosine over the pairs of rows of ``vectors`` [S, D], S >= 2."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    count = len(unit)
    return float((np.square(unit.sum(0)).sum() - np.square(unit).sum()) / (count * (count - 1)))


def group_means(values: np.ndarray, labels: Sequence[str], minimum: int) -> dict[str, np.ndarray]:
    """``values`` [P] of each label that at least ``minimum`` prompts bear."""
    counts, array = Counter(labels), np.asarray(labels)
    return {label: values[array == label] for label in sorted(counts) if counts[label] >= minimum}


def largest_gap(values: np.ndarray, labels: Sequence[str], minimum: int, seed: int) -> dict[str, Any] | None:
    """Largest minus smallest mean of ``values`` [P] among groups of at least ``minimum`` prompts; ``None`` with fewer
    than two.

    ``low``, ``high``: 95 % bootstrap, prompts resampled within their group; the largest and smallest are found anew
    each time.
    ``by_chance``: 95 % of gaps are smaller when the labels mean nothing (shuffled). A gap of many small groups is large
    by chance.
    """
    groups = group_means(values, labels, minimum)
    if len(groups) < 2:
        return None
    means = {label: float(group.mean()) for label, group in groups.items()}
    drawn = np.stack([bootstrap_means(group, seed + i) for i, group in enumerate(groups.values())])
    low, high = interval(drawn.max(0) - drawn.min(0))
    return {
        "gap": max(means.values()) - min(means.values()),
        "low": low,
        "high": high,
        "by_chance": float(np.quantile(shuffled_gaps(list(groups.values()), seed), 0.95)),
        "largest": max(means, key=lambda label: means[label]),
        "smallest": min(means, key=lambda label: means[label]),
    }


def shuffled_gaps(groups: Sequence[np.ndarray], seed: int, draws: int = DRAWS // 2) -> np.ndarray:
    """Gaps [draws] between the means of groups of the same sizes whose members were dealt at random."""
    pool, rng = np.concatenate(groups), np.random.default_rng(seed)
    bounds = np.cumsum([0, *map(len, groups)])
    shuffled = rng.permuted(np.tile(pool, (draws, 1)), axis=1)
    means = np.stack([shuffled[:, a:b].mean(1) for a, b in pairwise(bounds)])
    return means.max(0) - means.min(0)


def quantile_bins(values: Sequence[float], bins: int) -> list[str]:
    """A label ``low to high`` for each number: ``bins`` groups of about the same size, equal numbers in the same one.

    ``quantile_bins([1, 2, 3, 9], 2)`` is ``["1 to 2", "1 to 2", "3 to 9", "3 to 9"]``.
    """
    array = np.asarray(values, float)
    cuts = np.unique(np.quantile(array, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    places = np.searchsorted(cuts, array, side="left")
    names = {
        place: f"{array[places == place].min():g} to {array[places == place].max():g}" for place in set(places.tolist())
    }
    return [names[place] for place in places.tolist()]


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Chance that a positive [P] bool has a higher score [P] than a negative, ties counting half (Mann-Whitney);
    ``None`` without both."""
    ups, downs = scores[positive], np.sort(scores[~positive])
    if not len(ups) or not len(downs):
        return None
    below = np.searchsorted(downs, ups, "left") + np.searchsorted(downs, ups, "right")
    return float(below.mean() / (2 * len(downs)))
