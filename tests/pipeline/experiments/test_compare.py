"""Comparison and pilot: intervals and verdicts by hand, prompts paired by id and text, updates that fit a budget."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from configs.loading import dump_config
from configs.schema import RunConfig
from pipeline.cli.main import app
from pipeline.evaluation.outcome_file import read_outcomes, write_outcomes
from pipeline.evaluation.outcomes import Outcome
from pipeline.experiments import pilot
from pipeline.experiments.compare import compare, seed_difference


def outcome(index: int, mode: str, *, success: bool, prompt: str = "p") -> Outcome:
    return Outcome(
        variant="improved",
        mode=mode,  # type: ignore[arg-type]
        prompt_id=f"countdown/heldout/{index}",
        sample=0,
        success=success,
        reward=float(success),
        reward_parts={"success": float(success)},
        response="r",
        prompt=f"{prompt}{index}",
        new_tokens=3,
    )


def finished(
    folder: Path, solved: int, *, seed: int = 0, seconds: float = 10.0, prompt: str = "p", evaluated: bool = True
) -> Path:
    """A run that solved the first ``solved`` of 100 held-out prompts after two updates."""
    folder.mkdir()
    config = RunConfig(seed=seed, base={"model": "x"}, actions={}, clone={}, improve={}, tracking={"enabled": False})
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "summary.json").write_text(
        json.dumps({"stages": {"improve": {"seconds": seconds, "metrics": {"parameters_trained": 50.0}}}})
    )
    lines = [
        {"stage": "improve", "step": i, "time": 0.0, "reward": 0.1 * i, "rollouts": 8, "tokens": 80} for i in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        rows = [
            outcome(i, mode, success=i < solved, prompt=prompt) for mode in ("sampled", "greedy") for i in range(100)
        ]
        write_outcomes(folder / "evaluation.parquet", rows)
    return folder


def test_outcomes_come_back(tmp_path: Path) -> None:
    rows = [outcome(0, "greedy", success=True)]
    write_outcomes(tmp_path / "e.parquet", rows)
    assert read_outcomes(tmp_path / "e.parquet") == rows


def test_a_clear_difference_is_a_verdict_with_cost(tmp_path: Path) -> None:
    result = compare([finished(tmp_path / "a", 60, seconds=5.0)], [finished(tmp_path / "b", 40, seed=3)])
    found = result["success"]["sampled"]
    assert (
        found["mean"] == pytest.approx(0.2)
        and 0.05 < found["low"] < 0.2 < found["high"] < 0.3
        and found["prompts"] == 100
    )
    assert result["config"] == [{"key": "seed", "values": ["0", "3"]}]
    assert result["costs"]["a_over_b"] == {"seconds": 0.5, "tokens": 1.0, "rollouts": 1.0, "parameters_trained": 1.0}
    assert result["costs"]["a"]["tokens"] == 160
    assert result["verdict"].startswith("A is better by 0.200 (0.") and "at 0.5 of the cost" in result["verdict"]


def test_no_more_is_claimed_than_the_interval_allows(tmp_path: Path) -> None:
    result = compare([finished(tmp_path / "a", 50)], [finished(tmp_path / "b", 51)])
    assert result["verdict"].startswith("no significant difference with 100 prompts: A - B is -0.010")
    worse = compare([tmp_path / "a"], [finished(tmp_path / "c", 90)])
    assert worse["verdict"].startswith("B is better by 0.400")


def test_prompts_are_paired_by_text_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no held-out prompt in common"):
        compare([finished(tmp_path / "a", 50)], [finished(tmp_path / "b", 50, prompt="other")])


def test_a_run_without_evaluation_says_how_to_make_one(tmp_path: Path) -> None:
    result = compare([finished(tmp_path / "a", 50)], [finished(tmp_path / "b", 50, evaluated=False)])
    assert result["success"] is None and f"latent-control evaluate {tmp_path / 'b'}" in result["verdict"]


def test_seeds_are_the_unit_with_several_runs(tmp_path: Path) -> None:
    a = [finished(tmp_path / f"a{i}", 60 + i, seed=i) for i in range(3)]
    b = [finished(tmp_path / f"b{i}", 50 + 2 * i, seed=i) for i in range(3)]
    found = compare(a, b)["success"]["sampled"]
    # Differences 0.10, 0.09, 0.08: mean 0.09, standard error 0.01 / sqrt(3); t(0.975, 2) = 4.303.
    assert found["unit"] == "seeds" and found["mean"] == pytest.approx(0.09)
    assert found["low"] == pytest.approx(0.09 - 4.3027 * 0.01 / 3**0.5, abs=1e-5)
    with pytest.raises(ValueError, match="2 or more on each side"):
        compare(a, b[:1])


def test_welch_by_hand() -> None:
    # Both variances 0.02 / 2 = 0.01; two degrees of freedom.
    found = seed_difference(np.array([0.1, 0.3]), np.array([0.5, 0.7]), paired=False)
    assert found["mean"] == pytest.approx(-0.4) and found["high"] == pytest.approx(-0.4 + 4.3027 * 0.02**0.5, abs=1e-4)


def test_command_writes_the_page_beside_b(tmp_path: Path) -> None:
    a, b = finished(tmp_path / "a", 60), finished(tmp_path / "b", 40)
    done = CliRunner().invoke(app, ["compare", str(a), str(b)])
    assert done.exit_code == 0 and "A is better by 0.200" in done.output
    assert "differences on the same held-out prompts" in done.output.lower() and "A / B" in done.output
    page = (b / "compare-with-a.html").read_text()
    assert '"title":"Reward by update"' in page and '"from":' in page, "curves, and intervals on one scale"
    asked = CliRunner().invoke(
        app, ["compare", "--a", str(a), "--b", str(b), "--json", "--html", str(tmp_path / "x.html")]
    )
    assert json.loads(asked.stdout)["success"]["greedy"]["a"] == 0.6 and (tmp_path / "x.html").is_file()
    assert CliRunner().invoke(app, ["compare", str(a)]).exit_code == 2


PACE = pilot.Pace(update={"actions": 0.1, "clone": 0.1, "token_level": 0.4, "improve": 0.2}, fixed=20.0, probe=30.0)


def test_updates_fit_the_budget() -> None:
    # A full pilot: 60 + 50 + 60 + 30 = 200 s. Of 166.67 s 0.9 are 150; less 50 leaves 100: half of it.
    assert pilot.planned_updates(PACE, 166.67 / 60) == {"actions": 300, "clone": 250, "token_level": 75, "improve": 75}
    assert pilot.planned_updates(PACE, 60) == pilot.FULL


def test_a_budget_without_use_is_refused_with_numbers() -> None:
    # A tenth needs 20 s, with 50 s before it and a reserve: 70 / 0.9 s = 1.3 minutes.
    with pytest.raises(
        ValueError, match=r"--minutes 1: nothing useful fits.*token_level 0\.40 s.*give --minutes 1\.3 or more"
    ):
        pilot.planned_updates(PACE, 1)


def test_pace_is_the_median_step_and_what_is_left_over(tmp_path: Path) -> None:
    lines = [{"stage": stage, "step": i, "time": 100.0 + i * 2} for stage in pilot.FULL for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pace = pilot.measure(tmp_path, 40.0)
    assert pace.update == dict.fromkeys(pilot.FULL, 2.0) and pace.fixed == 40.0 - 4 * 3 * 2.0


def test_advice_says_how_many_prompts_it_takes() -> None:
    found = {"a": 0.5, "b": 0.45, "mean": 0.05, "low": -0.05, "high": 0.15, "prompts": 100}
    # Half as wide takes four times as many.
    assert "about 400 held-out prompts" in pilot.advice({"success": {"sampled": found}})[1]
    assert "neither side" in pilot.advice({"success": {"sampled": found | {"a": 0.0, "b": 0.0}}})[0]


def test_pilot_config_is_valid_and_refuses_bad_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n')
    done = CliRunner().invoke(
        app,
        ["pilot", "--prompts", str(rows), "--base", "configs/models/countdown-1m", "--out", str(tmp_path / "o")],
    )
    assert done.exit_code == 2 and "line 2: no key 'answer'" in done.output
