"""The search for a codebook: its criterion by hand, who becomes a finalist, what is recommended, and one small search
in full."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.loading import load_config
from configs.schema import RunConfig
from pipeline.cli.main import app
from pipeline.experiments.codebook_score import CodesTrial, score, tuned
from pipeline.experiments.tune_codes import Space, finalists, named, recommended, require_stages

ROOT = Path(__file__).resolve().parents[3]
OWN = {"num_actions": 64, "span": 1, "temperature": 2.0, "inverse_dynamics_layers": None, "policy_layers": None}


@pytest.fixture(scope="module")
def quickstart() -> RunConfig:
    return load_config(ROOT / "configs" / "quickstart.yaml")


def trial(
    codes: int, value: float, *, cloned: bool = True, reward: tuple[float, float, float] | None = None
) -> CodesTrial:
    won = None if reward is None else dict(zip(("mean", "low", "high"), reward, strict=True))
    return CodesTrial(
        settings={**OWN, "num_actions": codes}, measures={}, score=value, updates=600, cloned=cloned, reward=won
    )


def test_score_by_hand() -> None:
    measures = {"nll_codes": 0.2, "inverse_dynamics_code_perplexity": math.e**2}
    assert score(measures) == pytest.approx(0.2 + 0.05 * 2)
    assert score(measures | {"nll_marginal": 1.5, "nll_base_same": 1.2}) == pytest.approx(0.2 + 0.3 + 0.1)
    assert score(measures | {"nll_marginal": 1.0, "nll_base_same": 1.2}) == pytest.approx(0.3), (
        "a gain over the base is no loss"
    )


def test_the_configs_own_setting_comes_first_and_nothing_twice(quickstart: RunConfig) -> None:
    found = Space().settings(quickstart, 12, seed=3)
    assert found[0] == OWN and len(found) == 12 and len({named(s) for s in found}) == 12
    assert Space().settings(quickstart, 12, seed=3) == found != Space().settings(quickstart, 12, seed=4)
    assert len(Space(num_actions=(64,), span=(1, 2), temperature=()).settings(quickstart, 50, seed=0)) == 2


def test_a_tuned_config_is_a_valid_one(quickstart: RunConfig) -> None:
    found = tuned(quickstart, {**OWN, "num_actions": 16, "span": 4, "temperature": 0.3}, updates=7)
    assert found.actions is not None and found.improve is not None
    assert (found.actions.num_actions, found.actions.span, found.actions.final_temperature) == (16, 4, 0.3)
    assert found.improve.updates == 7 and found.clone == quickstart.clone


def test_finalists_are_the_best_and_always_the_configs_own() -> None:
    trials = [trial(16, 0.1), trial(32, 0.2), trial(128, 0.3), trial(64, 0.9), trial(8, 0.05, cloned=False)]
    assert [t.settings["num_actions"] for t in finalists(trials, 3, OWN)] == [16, 32, 64]
    assert [t.settings["num_actions"] for t in finalists([*trials[:2], trial(64, 0.15, cloned=False)], 2, OWN)] == [
        16,
        64,
    ]


@pytest.mark.parametrize(
    ("other", "chosen"), [((0.7, 0.66, 0.74), 32), ((0.7, 0.58, 0.82), 64), ((0.5, 0.45, 0.55), 64)]
)
def test_another_setting_must_be_better_beyond_its_interval(other: tuple[float, float, float], chosen: int) -> None:
    played = [trial(32, 0.1, reward=other), trial(64, 0.3, reward=(0.6, 0.55, 0.65)), trial(16, 0.0)]
    assert recommended(played, OWN).settings["num_actions"] == chosen


def test_what_cannot_be_searched_is_said(quickstart: RunConfig) -> None:
    with pytest.raises(ValueError, match="missing: clone"):
        require_stages(quickstart.model_copy(update={"clone": None}))


@pytest.mark.parametrize("option", [("--span", "1,x"), ("--num-actions", "1"), ("--temperature", "0")])
def test_wrong_values_end_before_work(option: tuple[str, str], tmp_path: Path) -> None:
    command = ["tune-codes", str(ROOT / "configs/quickstart.yaml"), *option, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and option[0] in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_search_ends_in_a_config_that_runs(tmp_path: Path) -> None:
    out = tmp_path / "codes"
    short = [
        "actions.updates=24",
        "clone.updates=10",
        "actions.evaluation_sequences=16",
        "clone.evaluation_sequences=16",
    ]
    short += ["improve.prompts_per_update=4", "cluster.learner_threads=1", "tracking.enabled=false"]
    search = [
        "--num-actions",
        "8",
        "--span",
        "2",
        "--temperature",
        "",
        "--trials",
        "2",
        "--finalists",
        "1",
        "--rl-updates",
        "2",
    ]
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "tune-codes",
        "configs/quickstart.yaml",
        *short,
        *search,
        "--minutes",
        "20",
        "--json",
    ]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    trials = [*result["finalists"], *result["stopped"]]
    assert sorted((t["settings"]["num_actions"], t["settings"]["span"]) for t in trials) == [(8, 2), (64, 1)]
    assert result["own"] in [t["settings"] for t in result["finalists"]]
    assert all(t["reward"] is not None and t["reward"]["low"] <= t["reward"]["mean"] for t in result["finalists"])
    config = load_config(out / "recommended.yaml")
    assert config.actions is not None and config.improve is not None
    assert config.actions.num_actions == result["recommended"]["num_actions"] and config.improve.updates == 150
    assert (out / "codes.png").read_bytes().startswith(b"\x89PNG") and "recommended" in (out / "codes.html").read_text()
    assert not list(out.rglob("*.pkl"))
