"""The judged responses to held-out prompts that an evaluation consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.modes import Mode
from rollout_workers.rollouts import Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A row of ``evaluation.parquet``.

    ``Outcome(variant="improved", mode="sampled", prompt_id="countdown/heldout/17", sample=0, success=True, reward=1.0,
    ...)``
    """

    variant: str
    mode: Mode
    prompt_id: str
    sample: int
    """0 to samples_per_prompt - 1; 0 when greedy."""
    success: bool
    """False, too, when the verifier failed; then ``reward`` is ``None``."""
    reward: float | None
    reward_parts: Mapping[str, float]
    response: str
    prompt: str
    new_tokens: int


def outcomes_of(variant: str, mode: Mode, rollouts: Sequence[Rollout], samples: int) -> list[Outcome]:
    """Rollouts (prompts outer, ``samples`` of each inner) as outcomes."""
    return [
        Outcome(
            variant=variant,
            mode=mode,
            prompt_id=rollout.prompt_id,
            sample=place % samples,
            success=rollout.success,
            reward=rollout.reward,
            reward_parts=rollout.reward_parts,
            response=rollout.text,
            prompt=rollout.prompt_text,
            new_tokens=rollout.new_tokens,
        )
        for place, rollout in enumerate(rollouts)
    ]


def success_matrix(outcomes: Sequence[Outcome], samples: int) -> np.ndarray:
    """[prompts, samples], 1.0 where a response succeeded."""
    return np.array([o.success for o in outcomes], float).reshape(-1, samples)


def grouped(outcomes: Sequence[Outcome], samples: int) -> list[list[str]]:
    """Per prompt, its responses."""
    return [[o.response for o in outcomes[first : first + samples]] for first in range(0, len(outcomes), samples)]
