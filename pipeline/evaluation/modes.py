"""The ways in which an evaluation decodes, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Mode = Literal["sampled", "greedy", "greedy_token"]
"""A latent policy decodes greedily in two ways: by code ("greedy") and by token; other models have one, "greedy"."""
MODES: dict[str, str] = {"sampled": "sampled", "greedy": "greedy", "greedy_token": "greedy by token"}
"""The modes and how they are read."""


def rollout_words(evaluation: Mapping[str, Any]) -> str:
    """``512 held-out prompts, one sampled and one greedy rollout per prompt``."""
    samples = evaluation.get("samples_per_prompt", 1)
    sampled = "one" if samples == 1 else samples
    return f"{evaluation['prompts']} held-out prompts, {sampled} sampled and one greedy rollout per prompt"


def greedy_words(evaluation: Mapping[str, Any]) -> list[str]:
    """What is greedy in an evaluation that has a latent policy's two kinds; nothing for older ones."""
    if not any(isinstance(row, Mapping) and "greedy_token" in row for row in evaluation.values()):
        return []
    count = evaluation.get("mixture_codes")
    summed = "all" if count is None else f"the {count} likeliest"
    return [
        f"latent policies by code and by token (mixture over {summed} codes; seconds per token relative to by code)"
    ]
