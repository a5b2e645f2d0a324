"""Numbers say what they are: whose codes, how many groups taught nothing, what each stage did."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs.gates import parse_gate
from configs.schema import Evaluation, Improve
from pipeline.cli.output import result_table
from pipeline.evaluation.gates import judge_gates, measure_of
from pipeline.evaluation.outcomes import Mode, Outcome
from pipeline.evaluation.results import Played, differences, variant_numbers
from pipeline.pages.report.codebook import usage_of
from pipeline.rl.rollout_metrics import tied_groups, tied_warning
from pipeline.rl.rollout_pool import FinishedRequest

NAN = float("nan")


def finished(rewards: list[float], group_size: int) -> FinishedRequest:
    request: Any = SimpleNamespace(group_size=group_size)
    return FinishedRequest(request=request, rollouts=None, summary=SimpleNamespace(rewards=tuple(rewards)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rewards", "size", "share"),
    [
        ([0.1, 0.1, 0.1, 0.0, 0.1, 0.1], 3, 0.5),
        ([0.1] * 8, 4, 1.0),
        ([0.0, 1.0, 1.0, 0.0], 2, 0.0),
        ([NAN, 1.0, 0.0, 0.0, NAN, NAN, NAN, 0.5, 0.5], 3, 2 / 3),
    ],
)
def test_tied_groups_by_hand(rewards: list[float], size: int, share: float) -> None:
    assert tied_groups([finished(rewards, size)])["tied_groups"] == pytest.approx(share)
    assert tied_groups([finished(rewards, size), finished(rewards, size)])["tied_groups"] == pytest.approx(share)


def test_single_rollouts_are_no_groups() -> None:
    assert tied_groups([finished([1.0, 1.0, 0.0], 1)]) == {}


@pytest.mark.parametrize(
    ("share", "algorithm", "said"), [(0.34, "grpo", 1), (0.95, "rloo", 1), (0.1, "grpo", 0), (0.95, "ppo", 0)]
)
def test_a_run_that_wastes_its_groups_says_what_to_do(share: float, algorithm: Any, said: int) -> None:
    found = tied_warning("improve", Improve(algorithm=algorithm, group_size=8), share)
    assert len(found) == said
    for text in found:
        assert f"{share:.0%}" in text and "improve.group_size (now 8)" in text and "rollout.temperature" in text


def played(successes: str, usage: dict[str, float] | None = None) -> Played:
    def rows(mode: Mode) -> list[Outcome]:
        return [
            Outcome(
                variant="x",
                mode=mode,
                prompt_id=str(i),
                sample=0,
                success=mark == "1",
                reward=float(mark == "1"),
                reward_parts={},
                response="",
                prompt="",
                new_tokens=3,
            )
            for i, mark in enumerate(successes)
        ]

    return Played(sampled=rows("sampled"), greedy=rows("greedy"), usage=usage or {})


def test_what_cloning_and_fine_tuning_did_stands_beside_what_rl_did() -> None:
    by_stage = {"base": "0000", "cloned": "1000", "finetuned": "1100", "improved": "1111", "token_level": "0001"}
    found = differences({name: played(marks) for name, marks in by_stage.items()}, 1, {}, 0)
    means = {name: passes["sampled"]["mean"] for name, passes in found.items()}
    assert means == {
        "cloned - base": 0.25,
        "finetuned - base": 0.5,
        "finetuned - cloned": 0.25,
        "token_level - base": 0.25,
        "improved - base": 1.0,
        "improved - cloned": 0.75,
        "improved - finetuned": 0.5,
        "improved - token_level": 0.75,
    }
    assert list(differences({"base": played("01"), "offline": played("11"), "cloned": played("01")}, 1, {}, 0)) == [
        "cloned - base",
        "offline - base",
        "offline - cloned",
    ]


def test_the_policys_own_codes_are_printed_and_the_others_named_for_their_model() -> None:
    usage = {"policy_alive_codes": 7.0, "policy_code_perplexity": 5.25}
    row = variant_numbers(played("01", usage), Evaluation(), 0, None, {}) | {"inverse_dynamics_code_perplexity": 51.5}
    text = result_table({"prompts": 2, "improved": row})
    assert "policy_code_perplexity: improved 5.2" in text and "inverse_dynamics_code_perplexity: improved 51.5" in text
    assert "\ncode_perplexity" not in text


@pytest.mark.parametrize("name", ["code_perplexity", "inverse_dynamics_code_perplexity"])
def test_gates_with_the_older_name_hold_on_new_and_older_evaluations(name: str) -> None:
    new, old = {"inverse_dynamics_code_perplexity": 51.5}, {"code_perplexity": 51.5}
    assert judge_gates([f"{name} >= 40"], {"improved": new}, "improved")[0].value == 51.5
    assert measure_of(old, "code_perplexity") == 51.5
    assert parse_gate("policy_code_perplexity >= 3").measure == "policy_code_perplexity"


def test_observed_tokens_are_nobodys_choice() -> None:
    """Spans of two tokens begin again after what the environment said."""
    generated = np.array([1, 1, 1, 0, 0, 1, 1], bool)
    row = {"actions": np.array([2, 2, 3, 0, 0, 1, 1]), "generated": generated, "policy_version": 0}
    assert usage_of([row], 4, span=2).tolist() == [0, 1, 1, 1]
