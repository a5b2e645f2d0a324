"""How different the responses to one prompt are: distinct-n always, semantic diversity (the paper's measure) with an
embedder.

Pairs, unlike counts of distinct things, are as different in the mean among 2 responses as among 20; so
``differing_pairs`` and the mean cosine can be compared between models that solve different shares of the prompts. The
``_successful`` ones look at solutions only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.statistics import (
    differing_pairs,
    distinct_n,
    mean_pairwise_cosine,
    paired_difference,
    rate_interval,
)

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts -> vectors [texts, D]."""
Responses = Sequence[Sequence[str]]
"""Per prompt, its sampled responses."""


def diversity(
    responses: Responses, seed: int, cosines: np.ndarray | None = None
) -> dict[str, float | list[float] | None]:
    """Means over the prompts with two or more responses; ``cosines`` are ``prompt_cosines`` of the same responses."""
    several = [group for group in responses if len(group) > 1]
    if not several:
        return {}
    found: dict[str, float | list[float] | None] = {}
    for n in (1, 2, 3):
        values = [value for group in several if (value := distinct_n(group, n)) is not None]
        found[f"distinct_{n}"] = float(np.mean(values)) if values else None
    found["distinct_responses"] = float(np.mean([len(set(group)) / len(group) for group in several]))
    pairs = np.array([differing_pairs(group) for group in several])
    found |= {
        "differing_pairs": float(pairs.mean()),
        "differing_pairs_interval": rate_interval(pairs, seed),
    }
    return found if cosines is None else found | semantic(cosines[~np.isnan(cosines)], seed)


def semantic(cosines: np.ndarray, seed: int) -> dict[str, float | list[float] | None]:
    """1 / mean pairwise cosine with its interval, of one mean cosine per prompt [P]; ``None`` where the mean is not
    positive."""
    low, high = (2 * bound - 1 for bound in rate_interval((cosines + 1) / 2, seed))
    positive = low > 0 and float(cosines.mean()) > 0
    return {
        "pairwise_cosine": float(cosines.mean()),
        "semantic_diversity": 1 / float(cosines.mean()) if cosines.mean() > 0 else None,
        "semantic_diversity_interval": [1 / high, 1 / low] if positive else None,
    }


def prompt_cosines(responses: Responses, embed: Embed) -> np.ndarray:
    """Mean pairwise cosine of each prompt's responses, [P]; NaN with fewer than two. Each different text is embedded
    once."""
    texts = sorted({text for group in responses if len(group) > 1 for text in group})
    vectors = dict(zip(texts, embed(texts), strict=True)) if texts else {}
    return np.array(
        [mean_pairwise_cosine(np.stack([vectors[t] for t in g])) if len(g) > 1 else np.nan for g in responses]
    )


def solutions(responses: Responses, successes: Sequence[Sequence[bool]]) -> list[list[str]]:
    """Per prompt, the responses that succeeded."""
    return [
        [text for text, good in zip(group, marks, strict=True) if good]
        for group, marks in zip(responses, successes, strict=True)
    ]


def of_solutions(found: Responses, seed: int, cosines: np.ndarray | None) -> dict[str, Any]:
    """``diversity`` of the successful responses, its names with ``_successful``, and how many prompts that is about."""
    measured = diversity(found, seed, cosines)
    renamed = {_successful(name): value for name, value in measured.items() if not name.startswith("distinct")}
    return renamed | {"prompts_with_two_successes": sum(len(group) > 1 for group in found)}


def _successful(name: str) -> str:
    stem, _, tail = name.partition("_interval")
    return f"{stem}_successful" + ("_interval" if name.endswith("_interval") else tail)


def at_equal_success(better: Mapping[str, np.ndarray], worse: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Paired differences of diversity on the prompts that *both* solved at least twice: neither is more varied for
    failing more.

    Args:
        better, worse: per-prompt values [P] by measure, NaN where a prompt has fewer than two solutions.
    """
    result = {}
    for name in (name for name in better if name in worse):
        both = ~np.isnan(better[name]) & ~np.isnan(worse[name])
        if both.any():
            result[name] = paired_difference(better[name][both], worse[name][both], seed) | {"prompts": int(both.sum())}
    return result


def per_prompt_pairs(responses: Responses) -> np.ndarray:
    """``differing_pairs`` of each prompt, [P]; NaN with fewer than two responses."""
    return np.array([differing_pairs(group) if len(group) > 1 else np.nan for group in responses])
