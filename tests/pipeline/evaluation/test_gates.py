"""Gates: their form, what is wrong with one, verdicts by hand, costs."""

from __future__ import annotations

from typing import Any

import pytest

from configs.checks import cross_field_problems
from configs.gates import Gate, final_variant, measures, parse_gate
from configs.schema import RunConfig
from pipeline.evaluation.cost import variant_costs
from pipeline.evaluation.gates import applicable, final_of, judge_gates, judgement, tags

FULL = {"samples_per_prompt": 4, "pass_at": (1, 4), "slices": ("target",), "embedder": "encoder"}


def config(*gates: str, **sections: Any) -> RunConfig:
    return RunConfig(
        **{"base": {"model": "x"}, "actions": {}, "clone": {}, "improve": {}, "evaluation": FULL, "gates": gates}
        | sections
    )


@pytest.mark.parametrize(
    ("text", "variant", "measure", "sign", "bound"),
    [
        ("success >= 0.6", None, "success", ">=", 0.6),
        (" improved.greedy<.5 ", "improved", "greedy", "<", 0.5),
        ("pass_at_4 > 1e-1", None, "pass_at_4", ">", 0.1),
        ("token_level.nll_rise <= -2", "token_level", "nll_rise", "<=", -2.0),
    ],
)
def test_form(text: str, variant: str | None, measure: str, sign: str, bound: float) -> None:
    assert parse_gate(text) == Gate(text=text.strip(), variant=variant, measure=measure, sign=sign, bound=bound)


@pytest.mark.parametrize(
    "bad",
    ["success", "success == 1", "success >= half", "success >= 0.6 or True", "__import__('os') >= 1", "a.b.c > 1", ""],
)
def test_nothing_else_is_a_gate(bad: str) -> None:
    with pytest.raises(ValueError, match="is not a condition of the form"):
        parse_gate(bad)
    (problem,) = cross_field_problems(config(bad))
    assert problem.startswith("gates[0]: ")


@pytest.mark.parametrize(
    ("gate", "wanted"),
    [
        ("sucess >= 0.6", "did you mean success?"),
        ("imprved.greedy > 0", "did you mean improved?"),
        ("finetuned.greedy > 0", "makes no variant finetuned; it makes base, cloned, improved"),
        ("pass_at_8 > 0", "needs 8 in evaluation.pass_at, which is [1, 4]"),
        ("base.coverage > 0", "base has no latent actions"),
        ("base.policy_alive_codes > 3", "base has no latent actions"),
        ("base.base_nll_rise < 1", "base has no latent actions"),
    ],
)
def test_names_are_checked(gate: str, wanted: str) -> None:
    (problem,) = cross_field_problems(config("success >= 0.1", gate))
    assert problem.startswith(f"gates[1]: {gate}: ")
    assert wanted in problem


@pytest.mark.parametrize(
    ("gate", "evaluation", "wanted"),
    [
        ("slice_gap <= 0.1", {"samples_per_prompt": 2}, "evaluation.slices"),
        ("distinct_1 > 0", {}, "evaluation.samples_per_prompt of 2"),
        ("semantic_diversity > 1", {"samples_per_prompt": 2}, "evaluation.embedder"),
        ("kl_to_base <= 0.2", {"marginal_sequences": 0}, "evaluation.marginal_sequences"),
    ],
)
def test_what_the_evaluation_lacks_is_said(gate: str, evaluation: dict[str, Any], wanted: str) -> None:
    (problem,) = cross_field_problems(config(gate, evaluation=evaluation))
    assert f"needs {wanted}" in problem
    assert cross_field_problems(config(gate)) == []


def test_gates_need_an_evaluation() -> None:
    (problem,) = cross_field_problems(config("success > 0", evaluation=None))
    assert problem.startswith("gates: they judge the evaluation, but evaluation is null")


def test_evaluation_fields_that_contradict_each_other() -> None:
    wrong = {"samples_per_prompt": 1, "pass_at": (1, 8), "embedder": "e", "retention": {"kind": "text"}}
    places = [p.partition(":")[0] for p in cross_field_problems(config(evaluation=wrong))]
    assert places == ["evaluation.pass_at", "evaluation.embedder", "evaluation.retention.path"]
    (problem,) = cross_field_problems(config(evaluation={"samples_per_prompt": 200}))
    assert problem.startswith("evaluation.samples_per_prompt: 200")


def test_the_final_variant() -> None:
    assert final_variant(config()) == "improved"
    assert final_variant(config(improve={"level": "token"})) == "token_level"
    assert final_variant(config(improve=None)) == "cloned"
    assert final_variant(config(improve=None, improve_offline={})) == "offline"
    assert final_of({"prompts": 3, "base": {"greedy": 0.1}, "improve": {"greedy": 0.2}}) == "improve"
    assert (
        final_of({"base": {"greedy": 0.1}, "improved": {"greedy": 0.1}, "token_level": {"greedy": 0.2}}) == "improved"
    )


RESULT = {
    "prompts": 8,
    "base": {"sampled": 0.2, "greedy": 0.6},
    "improved": {"sampled": 0.6, "greedy": 0.5, "kl_to_base": 0.3, "semantic_diversity": None},
}


def test_verdicts_by_hand() -> None:
    gates = [
        "success >= 0.6",
        "success > 0.6",
        "base.greedy >= 0.5",
        "kl_to_base <= 0.2",
        "semantic_diversity >= 1",
        "coverage > 0",
    ]
    verdicts = judge_gates(gates, RESULT, "improved")
    assert [v.passed for v in verdicts] == [True, False, True, False, False, False]
    assert [v.value for v in verdicts] == [0.6, 0.6, 0.6, 0.3, None, None]
    assert judgement(verdicts)["passed"] is False
    assert judgement(verdicts[:1]) == {
        "passed": True,
        "verdicts": [
            {"gate": gates[0], "variant": "improved", "value": 0.6, "passed": True, "tag": "success at least 0.6"}
        ],
    }
    assert tags(verdicts[2:5]) == {
        "gates": "failed",
        "gate: base.greedy at least 0.5": "passed (0.6)",
        "gate: kl_to_base at most 0.2": "failed (0.3)",
        "gate: semantic_diversity at least 1": "failed (not measured)",
    }


def test_a_value_that_is_no_number_passes_nothing() -> None:
    assert not any(parse_gate(f"success {sign} 0").holds(float("nan")) for sign in (">=", "<=", ">", "<"))


def test_a_single_checkpoint_is_judged_by_what_is_there() -> None:
    gates = ("success > 0", "cloned.greedy > 0", "base.greedy > 0")
    assert applicable(gates, RESULT) == ("success > 0", "base.greedy > 0")


def test_every_gate_name_is_a_measure_of_something() -> None:
    assert {"success", "slice_gap", "kl_to_base", "pass_at_4", "parameters_trained"} <= measures(config()).keys()
    assert all(lacks == "" for lacks in measures(config()).values())


def test_costs_add_up_along_the_way_to_a_variant() -> None:
    stages: dict[str, Any] = {
        "actions": {"seconds": 10.0, "metrics": {"parameters_trained": 100.0}},
        "clone": {"seconds": 5.0, "metrics": {"parameters_trained": 20.0}},
        "improve_offline": {"seconds": 2.0, "metrics": {"parameters_trained": 20.0}},
        "token_level": {"seconds": 7.0, "metrics": {"parameters_trained": 9.0, "tokens": 800.0}},
        "improve": {"seconds": 3.0, "metrics": {"parameters_trained": 20.0, "tokens": 1000.0}},
    }
    costs = variant_costs(stages, level="latent")
    assert costs["base"] == {"cost_seconds": 0.0, "cost_tokens": 0.0, "parameters_trained": 0.0}
    assert costs["cloned"] == {"cost_seconds": 15.0, "cost_tokens": 0.0, "parameters_trained": 120.0}
    assert costs["offline"] == {"cost_seconds": 17.0, "cost_tokens": 0.0, "parameters_trained": 140.0}
    assert costs["improved"] == {"cost_seconds": 20.0, "cost_tokens": 1000.0, "parameters_trained": 160.0}
    assert costs["token_level"] == {"cost_seconds": 7.0, "cost_tokens": 800.0, "parameters_trained": 9.0}
    assert variant_costs(stages, level="token")["token_level"]["cost_seconds"] == 3.0
