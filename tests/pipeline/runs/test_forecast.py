"""How long a run takes, by stage: arithmetic from measured speeds, and the measuring itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.loading import load_config
from configs.schema import RunConfig
from pipeline.runs.forecast import AROUND, AROUND_STAGE, BY_TOKEN, REPORTING, START, WRITING, Speeds, from_speeds, lines
from pipeline.stages.speed import Stopwatch, extrapolated, measured_speeds

QUICKSTART = Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml"
SPEEDS = Speeds(
    load=2.0,
    update={"actions": 0.5, "clone": 0.25},
    evaluation={"actions": 3.0, "clone": 1.0},
    final={"actions": 4.0, "clone": 6.0},
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
    # Evaluated at 100, 200 and 250.
    assert found["actions"] == pytest.approx(2 + AROUND_STAGE + 250 * 0.5 + 3 * 3 + 4)
    assert found["clone"] == pytest.approx(2 + AROUND_STAGE + (100 * 0.25 + 1) / 2 + 6 + START)
    assert found["improve"] == pytest.approx(START + 2 + 10 * (40 * 0.01 / 2 + 0.1 + AROUND))
    # Base and two latent policies, each loaded, sampled and greedy; the two also by token and with texts, which are
    # half of the 128 sequences.
    assert found["evaluate"] == pytest.approx(START + 100 * (3 * 2 + 2 * BY_TOKEN) * 0.01 / 2 + 3 * 2 + 2 * 7)
    assert found["pages"] == WRITING + 20
    assert from_speeds(of(actions={}, explorer={"enabled": False}), SPEEDS)["pages"] == REPORTING
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


@pytest.mark.parametrize(("fixed", "each", "tried", "seconds"), [(2.0, 0.5, [1, 1, 4], 10.0), (0.0, 5.0, [1, 1], 80.0)])
def test_a_slow_machine_is_tried_at_two_sizes_unless_it_is_very_slow(
    monkeypatch: pytest.MonkeyPatch, fixed: float, each: float, tried: list[int], seconds: float
) -> None:
    """From one row alone the first would be said to take 16 x 2.5 = 40 seconds."""
    timed, sizes = Stopwatch(), list[int]()

    def work(rows: int) -> int:
        sizes.append(rows)
        return rows

    monkeypatch.setattr(timed, "once", lambda work, rows: (work(rows), fixed + each * rows))
    assert timed(work, 16, 16) == seconds and sizes == tried


def test_the_quickstart_is_measured() -> None:
    speeds = measured_speeds(load_config(QUICKSTART, ["base.dtype=float32"]))
    assert speeds.update.keys() == speeds.evaluation.keys() == speeds.final.keys() == {"actions", "clone"}
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
