"""Sweeps: what is tried, what is told before anything starts, and going on after an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.loading import dump_config
from configs.schema import RunConfig
from pipeline.cli.main import app
from pipeline.cli.options import USAGE
from pipeline.experiments.sweep import SweepTrial, choices, done, overrides, parse_range, ranked, table

pytest_plugins = ("rl_fixtures",)


def call(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_ranges_are_lists_of_yaml_values() -> None:
    assert parse_range("improve.learning_rate=1.0e-4,5.0e-4") == ("improve.learning_rate", [1e-4, 5e-4])
    assert parse_range("improve.algorithm=grpo, rloo") == ("improve.algorithm", ["grpo", "rloo"])
    assert parse_range("clone.fit_temperature=[[1.0, 0.5], null]") == ("clone.fit_temperature", [[1.0, 0.5], None])
    for text in ("improve.updates", "=3", "improve.updates=", "improve.updates=[1"):
        with pytest.raises(ValueError, match="--try is"):
            parse_range(text)


def test_the_grid_and_a_draw_from_it() -> None:
    ranges = [("a", [1, 2]), ("b", ["x", "y", "z"])]
    grid = choices(ranges, None, 0)
    assert len(grid) == 6 and grid[0] == {"a": 1, "b": "x"} and grid[-1] == {"a": 2, "b": "z"}
    drawn = choices(ranges, 3, 1)
    assert drawn == choices(ranges, 3, 1) != choices(ranges, 3, 2)
    assert len({json.dumps(point) for point in drawn}) == 3
    with pytest.raises(ValueError, match="names a twice"):
        choices([("a", [1]), ("a", [2])], None, 0)


def test_overrides_read_back_as_they_were() -> None:
    assert overrides({"improve.algorithm": "grpo", "rollout.top_k": None}) == [
        'improve.algorithm="grpo"',
        "rollout.top_k=null",
    ]


def test_the_table_says_why_a_run_has_no_value() -> None:
    head, rows = table(
        [
            SweepTrial(name="00", choice={"a": 1}, value=0.5, low=0.4, high=0.6),
            SweepTrial(name="01", choice={"a": 2}, error="boom"),
        ],
        "success",
    )
    assert head == ["run", "a", "success"]
    assert rows == [["00", "1", "0.500 (0.400 to 0.600)"], ["01", "2", "boom"]]


@pytest.mark.parametrize(
    ("metric", "first"), [("success", "01"), ("improved.nll_rise", "00"), ("slice_gap", "00"), ("reward", "01")]
)
def test_the_best_value_is_first_also_where_less_is_better(metric: str, first: str) -> None:
    trials = [SweepTrial(name=f"0{n}", choice={"a": n}, value=value) for n, value in enumerate((0.2, 0.5, None))]
    assert [trial.name for trial in ranked(trials, metric)][::2] == [first, "02"]


@pytest.mark.parametrize(
    ("metric", "problem"),
    [
        ("succes", "--metric succes: unknown measure succes; did you mean success"),
        ("finetuned.greedy", "makes no variant finetuned"),
        ("nll", "nll needs evaluation.marginal_sequences of 1 or more"),
        ("success >= 0.5", "'success >= 0.5' is not a measure"),
    ],
)
def test_a_measure_that_no_run_will_have_is_told_before_anything_starts(
    config_file: Path, tmp_path: Path, metric: str, problem: str
) -> None:
    words = ("--try", "improve.learning_rate=1.0e-4,1.0e-3", "--out", str(tmp_path / "s"), "--metric", metric)
    found = call("sweep", str(config_file), *words)
    assert found.exit_code == USAGE and problem in " ".join(found.output.split())
    assert not (tmp_path / "s").exists()


@pytest.fixture(scope="module")
def config_file(config: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"num_actions": 8, "policy_layers": 1, "inverse_dynamics_layers": 1, "merge_layers": 1}
    settings = config(
        actions=shape | {"init": str(tiny_checkpoint), "updates": 0},
        improve={"updates": 2},
        rollout={"num_workers": 1},
        tracking={"enabled": False},
        evaluation={"prompts": 8, "marginal_sequences": 0},
    )
    path = tmp_path_factory.mktemp("sweep") / "config.yaml"
    path.write_text(dump_config(settings))
    return path


def test_a_run_whose_summary_was_damaged_is_not_done(tmp_path: Path) -> None:
    config = RunConfig(base={"model": "x"}, actions={}, evaluation=None, improve=None)
    assert not done(tmp_path, config), "no summary"
    (tmp_path / "summary.json").write_text('{"stages": {"actions": {}}}')
    assert done(tmp_path, config)
    (tmp_path / "summary.json").write_text('{"stages": {"acti')
    assert not done(tmp_path, config)


def test_every_points_errors_are_told_before_anything_starts(config_file: Path, tmp_path: Path) -> None:
    found = call("sweep", str(config_file), "--try", "improve.learning_rate=1.0e-4,-1", "--out", str(tmp_path / "s"))
    assert found.exit_code == USAGE and "learning_rate" in found.output
    found = call("sweep", str(config_file), "--try", "improve.learning_rat=1", "--out", str(tmp_path / "s"))
    assert found.exit_code == USAGE and "learning_rate" in found.output  # the near match
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_sweep_runs_and_goes_on_after_an_interruption(config_file: Path, tmp_path: Path, ray_session: None) -> None:
    words = (
        "sweep",
        str(config_file),
        "--try",
        "improve.learning_rate=1.0e-4,1.0e-3",
        "--out",
        str(tmp_path / "s"),
        "--json",
    )
    first = call(*words)
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)["trials"]
    assert {trial["name"] for trial in told} == {"00", "01"} and all(trial["value"] is not None for trial in told)
    assert all(trial["low"] <= trial["value"] <= trial["high"] for trial in told)

    # The second run lost its end; the first must not be touched.
    broken, kept = tmp_path / "s" / "01", tmp_path / "s" / "00" / "summary.json"
    before = kept.stat().st_mtime_ns
    (broken / "summary.json").unlink()
    (broken / "stages" / "improve.json").unlink()
    shutil.rmtree(broken / "checkpoints" / "improve")
    second = call(*words)
    assert second.exit_code == 0, second.output
    assert "1 finished before" in second.output
    assert kept.stat().st_mtime_ns == before
    assert (broken / "checkpoints" / "improve").is_dir()

    other = call("sweep", str(config_file), "--try", "improve.learning_rate=1.0e-4", "--out", str(tmp_path / "s"))
    assert other.exit_code == USAGE and "another config or other values" in other.output
