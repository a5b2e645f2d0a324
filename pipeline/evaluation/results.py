"""The numbers of an evaluation, from the judged responses of each variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from configs.schema import Evaluation
from pipeline.evaluation.diversity import (
    at_equal_success,
    diversity,
    of_solutions,
    per_prompt_pairs,
    solutions,
)
from pipeline.evaluation.modes import Mode
from pipeline.evaluation.outcomes import Outcome, grouped, success_matrix
from pipeline.evaluation.slices import field_problems, labels, sliced
from pipeline.evaluation.statistics import paired_difference, pass_at_k, rate_interval
from pipeline.runs.stage_table import TOKEN_LEVEL, TOKEN_SFT
from rollout_workers.tasks import Prompt

Cosines = tuple[np.ndarray, np.ndarray]
"""Mean pairwise cosine per prompt [P] among all responses, and among the solutions."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """What one variant did: every response, prompts outer, samples inner."""

    sampled: list[Outcome]
    greedy: list[Outcome]
    greedy_token: list[Outcome] | None = None
    """By token; ``None``: the model has no codes, and one way to be greedy."""
    token_cost: float | None = None
    """Seconds per token by token, over those by code."""
    usage: Mapping[str, float] = field(default_factory=dict)
    """Of the codes that the policy chose in ``sampled``: ``policy_alive_codes``, ``policy_code_perplexity``; empty
    where it chose none."""

    @property
    def passes(self) -> dict[Mode, list[Outcome]]:
        """The responses by mode."""
        found: dict[Mode, list[Outcome]] = {"sampled": self.sampled, "greedy": self.greedy}
        return found if self.greedy_token is None else found | {"greedy_token": self.greedy_token}

    def successes(self, samples: int) -> dict[str, np.ndarray]:
        """Success of each prompt, [P], by mode; sampled: the mean over its samples."""
        return {
            mode: success_matrix(rows, samples if mode == "sampled" else 1).mean(1)
            for mode, rows in self.passes.items()
        }


def slices_of(settings: Evaluation, heldout: Sequence[Prompt], prompts: int) -> dict[str, list[str]]:
    """The slice of each prompt that is played, by field of ``evaluation.slices``.

    Raises:
        ValueError: no prompt has such a field.
    """
    if not settings.slices:
        return {}
    metadata = [heldout[index].metadata for index in range(prompts)]
    if problems := field_problems(settings.slices, metadata):
        raise ValueError("; ".join(problems))
    return {field: labels(field, metadata) for field in settings.slices}


def variant_numbers(
    played: Played, settings: Evaluation, seed: int, cosines: Cosines | None, slices: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The row of one variant."""
    samples, outcomes = settings.samples_per_prompt, played.successes(settings.samples_per_prompt)
    numbers: dict[str, Any] = {}
    if played.token_cost is not None:
        numbers["greedy_token_cost"] = played.token_cost
    for mode, rows in played.passes.items():
        rate = outcomes[mode]
        # Several samples of one prompt are not independent: the interval is over prompts.
        numbers |= {mode: float(rate.mean()), f"{mode}_interval": rate_interval(rate, seed)}
        numbers[f"{mode}_tokens"] = sum(o.new_tokens for o in rows) / len(rows)
        numbers[f"{mode}_failures"] = sum(o.reward is None for o in rows)
    solved = success_matrix(played.sampled, samples).sum(1)
    for k in settings.pass_at:
        chances = pass_at_k(solved, samples, k)
        numbers |= {
            f"pass_at_{k}": float(chances.mean()),
            f"pass_at_{k}_interval": rate_interval(chances, seed),
        }
    return (
        numbers
        | dict(played.usage)
        | _variety(played, samples, seed, cosines)
        | (sliced(outcomes, slices, settings.slice_minimum, seed) if slices else {})
    )


def _variety(played: Played, samples: int, seed: int, cosines: Cosines | None) -> dict[str, Any]:
    """Diversity of all responses and of the solutions; nothing when there is one response per prompt."""
    if samples < 2:
        return {}
    among_all, among_solved = (None, None) if cosines is None else cosines
    solved = solved_responses(played, samples)
    return diversity(grouped(played.sampled, samples), seed, among_all) | of_solutions(solved, seed, among_solved)


def solved_responses(played: Played, samples: int) -> list[list[str]]:
    """Per prompt, the responses that solve it."""
    return solutions(grouped(played.sampled, samples), success_matrix(played.sampled, samples).astype(bool).tolist())


def differences(
    played: Mapping[str, Played], samples: int, cosines: Mapping[str, Cosines], seed: int
) -> dict[str, Any]:
    """Paired differences of success (by mode) and of diversity at equal success: what each stage did (against base and
    the model before; at token level against all before; fine-tuning under codes against the same without), then
    improved against each other variant, offline against each earlier one. What is greedy by token is compared with the
    one greedy of models without codes."""
    line = [name for name in played if name not in ("offline", "improved", TOKEN_SFT, TOKEN_LEVEL)]
    pairs = [(name, other) for place, name in enumerate(line) for other in dict.fromkeys((*line[:1], line[place - 1]))]
    pairs = [(better, worse) for better, worse in pairs if better != line[0]]
    over_tokens = [name for name in (*line[:1], TOKEN_SFT, TOKEN_LEVEL) if name in played]
    pairs += [(better, worse) for worse, better in combinations(over_tokens, 2)]
    pairs += [("finetuned", TOKEN_SFT)] if TOKEN_SFT in played else []
    pairs += [("improved", other) for other in played if other != "improved"]
    pairs += [("offline", other) for other in line]
    successes = {name: variant.successes(samples) for name, variant in played.items()}
    varied = {name: _varied(variant, samples, cosines.get(name)) for name, variant in played.items()}
    found = {}
    for better, worse in (pair for pair in pairs if pair[0] in played):
        passes = {
            mode: paired_difference(rates, successes[worse].get(mode, successes[worse]["greedy"]), seed)
            for mode, rates in successes[better].items()
        }
        equal = at_equal_success(varied[better], varied[worse], seed) if samples > 1 else {}
        found[f"{better} - {worse}"] = passes | equal
    return found


def _varied(played: Played, samples: int, cosines: Cosines | None) -> dict[str, np.ndarray]:
    """Per-prompt diversity of the solutions, [P], NaN where there are fewer than two."""
    pairs = {"differing_pairs_successful": per_prompt_pairs(solved_responses(played, samples))}
    return pairs if cosines is None else pairs | {"pairwise_cosine_successful": cosines[1]}
