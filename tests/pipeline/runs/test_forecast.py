"""How long a run takes, by stage: arithmetic from measured speeds, and the measuring itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.loading import load_config
from configs.schema import RunConfig
from pipeline.runs.forecast import AROUND, AROUND_STAGE, BY_TOKEN, START, WRITING, Speeds, from_speeds, lines
from pipeline.stages.speed import extrapolated, measured_speeds

QUICKSTART = Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml"
SPEEDS = Speeds(
    load=2.0,
    update={"actions": 0.5, "clone": 0.25},
    evaluation={"actions": 3.0, "clone": 1.0},
    rollout=0.01,
    tokens=12.0,
    learn=0.1,
    cores=4,
)


def of(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"base": {"model": "x"}, **sections})


def test_stages_add_up() -> None:
    config = of(
        actions={"updates": 250, "evaluate_every": 100},
        clone={"updates": 100, "num_workers": 2},
        improve={"updates": 10, "prompts_per_update": 5, "group_size": 8},
        rollout={"num_workers": 2},
        evaluation={"prompts": 100, "marginal_sequences": 64},
        explorer={"seconds": 20.0},
    )
    found = from_speeds(config, SPEEDS)
    assert found["actions"] == pytest.approx(
        2 + AROUND_STAGE + 250 * 0.5 + 4 * 3
    )  # evaluated at 100, 200 and, for longer, at the end
    assert found["clone"] == pytest.approx(2 + AROUND_STAGE + (100 * 0.25 + 2 * 1) / 2 + START)
    assert found["improve"] == pytest.approx(START + 2 + 10 * (40 * 0.01 / 2 + 0.1 + AROUND))
    # Base and two latent policies, each sampled and greedy; the two also by token; texts at half of the 128 sequences.
    assert found["evaluate"] == pytest.approx(START + 2 + 100 * (3 * 2 + 2 * BY_TOKEN) * 0.01 / 2 + 3 * 1.5)
    assert found["pages"] == WRITING + 20
    assert list(lines(config, found, 1.0))[-1].startswith("in all")


def test_more_workers_than_cores_gain_nothing_and_async_hides_the_shorter() -> None:
    sections = {"actions": {}, "improve": {"updates": 10, "prompts_per_update": 8, "group_size": 100, "mode": "async"}}
    for workers, at_once in ((2, 2), (4, 4), (16, 4)):
        found = from_speeds(of(**sections, rollout={"num_workers": workers}), SPEEDS)
        assert found["improve"] == pytest.approx(START + 2 + 10 * 800 * 0.01 / at_once)


def test_what_is_not_known_is_named() -> None:
    config = of(actions={}, improve={"token_baseline": True})
    found = from_speeds(config, SPEEDS)
    assert "token_level" not in found
    assert "without token_level" in list(lines(config, found, 1.0))[-1]
    assert "processes" not in list(lines(config, found, 1.4))[-1] and "2.0 times" in list(lines(config, found, 2.0))[-1]


def test_what_is_fixed_is_not_multiplied() -> None:
    assert extrapolated([(1, 5.0), (4, 8.0)], 16) == 20.0  # 4 + 1 a row
    assert extrapolated([(1, 5.0), (4, 8.0), (16, 20.0), (16, 22.0)], 16) == 21.0
    assert extrapolated([(3, 6.0)], 4) == 8.0
    assert extrapolated([(1, 5.0), (4, 4.0)], 16) == 4.0  # noise


def test_the_quickstart_is_measured() -> None:
    speeds = measured_speeds(load_config(QUICKSTART, ["base.dtype=float32"]))
    assert speeds.update.keys() == speeds.evaluation.keys() == {"actions", "clone"}
    assert speeds.tokens == 12  # each countdown answer has 11 tokens and an end
    assert all(0 < seconds < 60 for seconds in (*speeds.update.values(), speeds.rollout, speeds.learn, speeds.load))
    assert speeds.update["actions"] > speeds.rollout


def test_later_passes_of_cloning_cost_less() -> None:
    """From the second pass on, neither base nor inverse dynamics model is run."""
    mlp = ["base.dtype=float32", "actions.policy_kind=mlp"]
    once, often = (
        measured_speeds(load_config(QUICKSTART, [*mlp, f"clone.passes={n}"])).update["clone"] for n in (1, 20)
    )
    assert often < 0.7 * once
