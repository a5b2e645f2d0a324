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
FEW = 30
"""Where fewer prompts than these differ from the rest, a bootstrap sees too little: intervals are exact there."""


def wilson(successes: float, total: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of a success rate (Wilson, 1927)."""
    rate, spread = successes / total, z * z / total
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(max(0.0, rate * (1 - rate)) / total + spread / (4 * total)) / (1 + spread)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def exact_interval(successes: float, total: int, level: float = 0.95) -> list[float]:
    """Clopper and Pearson's interval of a success rate (1934), which covers at least ``level`` at any rate and count;
    0 to 1 of nothing.

    ``successes`` may be a sum of numbers between 0 and 1: its tails are no heavier than those of a count (Hoeffding,
    1956).
    """
    from scipy.special import betaincinv

    misses, tail = total - successes, (1 - level) / 2
    low = float(betaincinv(successes, misses + 1, tail)) if successes > 0 else 0.0
    high = float(betaincinv(successes + 1, misses, 1 - tail)) if misses > 0 else 1.0
    return [low, high]


def success_interval(successes: int, total: int) -> list[float]:
    """95 % interval of a success rate: Wilson's, exact where there are few successes or few failures."""
    return (exact_interval if min(successes, total - successes) < FEW else wilson)(successes, total)


def rate_interval(rates: np.ndarray, seed: int) -> list[float]:
    """95 % interval of the mean of ``rates`` [P], numbers between 0 and 1, one per prompt, over prompts.

    Bootstrap (Wilson's where each rate is 0 or 1), exact where few rates are above 0 or few below 1.
    """
    if np.isin(rates, (0, 1)).all():
        return success_interval(int(rates.sum()), len(rates))
    if min((rates > 0).sum(), (rates < 1).sum()) < FEW:
        return exact_interval(float(rates.sum()), len(rates))
    return interval(bootstrap_means(rates, seed))


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
    """Mean of ``better - worse`` over the same prompts [P] with its 95 % interval.

    Bootstrap; where few prompts differ from the rest, ``sign_interval``.
    """
    difference = (better - worse).round(12)
    if len(difference) - np.unique(difference, return_counts=True)[1].max() < FEW:
        low, high = sign_interval(difference)
    else:
        low, high = interval(bootstrap_means(difference, seed, draws))
    return {"mean": float(difference.mean()), "low": low, "high": high}


def sign_interval(difference: np.ndarray) -> list[float]:
    """95 % interval of the mean of few ``difference`` [P] by the exact sign test.

    The mean is s psi (2 theta - 1): psi the share of prompts that differ, theta the share of those that are better, s
    their mean size (1 where none differs). theta's exact interval excludes 1/2 just where the sign test (Conover, 1999,
    3.4) does at 5 %, and then this interval excludes 0; it spans all that is in both exact intervals, and Student's
    where sizes differ.
    """
    sizes, better = np.abs(difference[difference != 0]), int((difference > 0).sum())
    share, sign = exact_interval(len(sizes), len(difference)), exact_interval(better, len(sizes))
    scale = float(sizes.mean()) if len(sizes) else 1.0
    corners = [scale * psi * (2 * theta - 1) for psi in share for theta in sign]
    low, high = min(corners), max(corners)
    if len(np.unique(sizes)) > 1:
        mean, error = difference.mean(), difference.std(ddof=1) / math.sqrt(len(difference))
        half = student(len(difference) - 1) * float(error)
        most = 1.0 if sizes.max() <= 1 else math.inf  # shares differ by 1 at most, rewards by anything
        low, high = min(low, max(-most, float(mean) - half)), max(high, min(most, float(mean) + half))
    return [low, high]


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

    ``low``, ``high``: what the groups' exact intervals allow that hold together at 95 % (Bonferroni).
    ``by_chance``: 95 % of gaps are smaller when the labels mean nothing (shuffled). A gap of many small groups is large
    by chance.
    """
    groups = group_means(values, labels, minimum)
    if len(groups) < 2:
        return None
    means = {label: float(group.mean()) for label, group in groups.items()}
    level = 1 - 0.05 / len(groups)
    lows, highs = zip(*(exact_interval(float(g.sum()), len(g), level) for g in groups.values()), strict=True)
    return {
        "gap": max(means.values()) - min(means.values()),
        "low": max(0.0, max(lows) - min(highs)),
        "high": max(highs) - min(lows),
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
    Numbers have 6 digits, or as many as tell the groups apart.

    ``quantile_bins([1, 2, 3, 9], 2)`` is ``["1 to 2", "1 to 2", "3 to 9", "3 to 9"]``.
    """
    array = np.asarray(values, float)
    cuts = np.unique(np.quantile(array, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    places = np.searchsorted(cuts, array, side="left")
    ends = {place: (array[places == place].min(), array[places == place].max()) for place in set(places.tolist())}
    spelled = ({p: f"{a:.{digits}g} to {b:.{digits}g}" for p, (a, b) in ends.items()} for digits in (6, 10, 17))
    names = next(some for some in spelled if len(set(some.values())) == len(some))
    return [names[place] for place in places.tolist()]


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Chance that a positive [P] bool has a higher score [P] than a negative, ties counting half (Mann-Whitney);
    ``None`` without both."""
    ups, downs = scores[positive], np.sort(scores[~positive])
    if not len(ups) or not len(downs):
        return None
    below = np.searchsorted(downs, ups, "left") + np.searchsorted(downs, ups, "right")
    return float(below.mean() / (2 * len(downs)))
