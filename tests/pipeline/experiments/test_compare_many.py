"""Several runs side by side, with numbers that can be worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from explorer_data import made_up

from configs.loading import dump_config
from configs.schema import Improve, RunConfig
from pipeline.evaluation.outcome_file import write_outcomes
from pipeline.evaluation.outcomes import Outcome
from pipeline.experiments.compare import MOST_RUNS, side_by_side
from pipeline.experiments.comparison_page import sections
from pipeline.experiments.config_meaning import meaning
from pipeline.pages.explorer.page import write_page
from pipeline.storage import checksummed_jsonl

PROMPTS = 100


def make(folder: Path, name: str, solved: set[int], *, seed: int = 0, rate: float = 3e-4, base: str = "x") -> Path:
    """A run that solves the prompts ``solved`` in all modes, whose reward rises by 1/50 an update."""
    run = folder / name
    run.mkdir(parents=True)
    config = RunConfig(base={"model": base}, seed=seed, improve=Improve(learning_rate=rate), actions={}, clone={})
    (run / "config.yaml").write_text(dump_config(config))
    rows = [
        {"stage": "improve", "step": i, "reward": i / 50, "rollouts": 8, "tokens": 80, "seconds_update_total": 2.0}
        for i in range(1, 51)
    ]
    (run / "metrics.jsonl").write_text("".join(map(checksummed_jsonl.line, rows)))
    (run / "summary.json").write_text(json.dumps({"stages": {"improve": {"seconds": 100.0, "metrics": {}}}}))
    outcomes = [
        Outcome(
            variant="improved",
            mode=mode,
            prompt_id=f"t/heldout/{p}",
            sample=0,
            success=p in solved,
            reward=float(p in solved),
            reward_parts={},
            response=f"{name} says {p in solved}",
            prompt=f"prompt {p}",
            new_tokens=3,
        )
        for mode in ("sampled", "greedy", "greedy_token")
        for p in range(PROMPTS)
    ]
    write_outcomes(run / "evaluation.parquet", outcomes)
    return run


def test_two_runs_of_different_configs(tmp_path):
    a = make(tmp_path, "a", set(range(50)))
    b = make(tmp_path, "b", set(range(80)) - {0}, rate=1e-3)
    found = side_by_side([a, b])
    assert [(m["name"], [r["name"] for r in m["runs"]]) for m in found["methods"]] == [("A", ["a"]), ("B", ["b"])]
    success = {one["mode"]: one for one in found["methods"][1]["success"]}["greedy"]
    assert (success["value"], success["unit"]) == (0.79, "100 prompts") and success["low"] < 0.79 < success["high"]
    (sampled,) = [one for one in found["differences"] if one["mode"] == "sampled"]
    assert sampled["name"] == "B - A" and sampled["value"] == pytest.approx(0.29) and sampled["low"] > 0
    assert found["config"] == [{"key": "improve.learning_rate", "values": ["0.0003", "0.001"]}]
    # 31 prompts differ, 30 are listed; the first is the one that A alone solves.
    assert len(found["flipped"]) == 30 and found["flipped"][0] == {
        "prompt": "prompt 0",
        "a": "a says True",
        "b": "b says False",
        "better": "a",
    }
    # The last ten updates' mean, 0.91, is reached at the last update: 50 x 8 rollouts, 50 x 2 seconds.
    assert found["level"] == pytest.approx(np.mean(np.arange(41, 51) / 50))
    assert found["methods"][0]["reached"] == {"rollouts": 400.0, "seconds": 100.0}
    assert [one["across"] for one in found["figures"]] == ["update", "rollouts", "seconds"]
    assert found["figures"][1]["curves"][0]["x"][-1] == 400.0
    json.dumps(found, allow_nan=False)


def test_seeds_are_one_method_and_the_unit(tmp_path):
    runs = [make(tmp_path, f"a{seed}", set(range(50 + seed)), seed=seed) for seed in range(3)]
    runs += [make(tmp_path, f"b{seed}", set(range(80 + 2 * seed)), seed=seed, rate=1e-3) for seed in range(3)]
    found = side_by_side(runs)
    assert [len(m["runs"]) for m in found["methods"]] == [3, 3]
    success = found["methods"][0]["success"][0]
    # 0.50, 0.51, 0.52: sd 0.01, t = 4.3027
    assert success["value"] == pytest.approx(0.51) and success["unit"] == "3 seeds"
    assert success["high"] - 0.51 == pytest.approx(4.30265 * 0.01 / 3**0.5, rel=1e-4)
    assert {one["unit"] for one in found["differences"]} <= {"3 and 3 seeds"}
    one_seed = side_by_side([*runs[:3], runs[3]])
    assert one_seed["differences"][0]["unit"] == "100 prompts"
    assert one_seed["differences"][0]["value"] == pytest.approx(0.80 - 0.51)


def test_seeds_that_agree_do_not_make_a_result_certain(tmp_path):
    """Differences of 0.2 that rounding sets 1e-16 apart were an interval of that width."""
    runs = [make(tmp_path, f"a{solved}", set(range(solved)), seed=solved) for solved in (10, 30, 70)]
    runs += [make(tmp_path, f"b{n}", set(range(n + 20)), seed=n, rate=1e-3) for n in (10, 30, 70)]
    runs += [make(tmp_path, f"c{seed}", set(range(40)), seed=seed, rate=1e-4) for seed in range(2)]
    found = side_by_side(runs)
    one = found["differences"][0]
    assert one["value"] == pytest.approx(0.2) and one["high"] - one["low"] > 0.05 and one["unit"] == "100 prompts"
    success = found["methods"][2]["success"][0]
    assert success["value"] == pytest.approx(0.4) and success["high"] - success["low"] > 0.1
    assert success["unit"] == "100 prompts"


def test_codes_are_matched_by_the_tokens_that_they_wrote(tmp_path):
    runs = [make(tmp_path, name, {1}, rate=rate) for name, rate in (("a", 1e-3), ("b", 3e-4), ("c", 1e-4))]
    assert side_by_side(runs)["matched"] == []
    dataset = made_up(4, 40, 12, explained=0)
    # In b the same rollouts come from codes that are named the other way round; c has no page.
    turned = [replace(one, codes=tuple(3 - code for code in one.codes)) for one in dataset.rollouts]
    write_page([dataset], runs[0] / "explorer.html")
    write_page([replace(dataset, rollouts=tuple(turned))], runs[1] / "explorer.html")
    found = side_by_side(runs)["matched"]
    assert sorted(row["A"]["code"] for row in found) == [0, 1, 2, 3]
    assert {(row["A"]["code"] + row["B"]["code"], row["B"]["overlap"]) for row in found} == {(3, 1.0)}
    assert all(row.keys() == {"A", "B"} for row in found)
    tables = {table.title: table for section in sections(side_by_side(runs)) for table in section.tables}
    assert tables["Matched codes"].head[:5] == ["A code", "A top tokens", "A usage", "A gain", "B code"]
    assert len(tables["Matched codes"].rows) == 4


def test_a_forest_has_one_scale_and_its_zero(tmp_path):
    a, b = make(tmp_path, "a", set(range(50))), make(tmp_path, "b", set(range(80)), rate=1e-3)
    tables = {table.title: table for section in sections(side_by_side([a, b])) for table in section.tables}
    for name in ("Success of each method on its own held-out prompts", "Differences on the same held-out prompts"):
        drawn = [row[3] for row in tables[name].rows]
        assert len({(one["from"], one["to"]) for one in drawn}) == 1
        assert all(one["from"] <= one["low"] <= one["value"] <= one["high"] <= one["to"] for one in drawn)
    assert tables["Differences on the same held-out prompts"].rows[0][:2] == ["B - A, sampled", "+0.300"]
    assert drawn[0]["from"] == 0.0, "the rule at 0 is on the scale"
    answers = tables["Held-out prompts that A or B alone solves, greedy (30)"].rows[0]
    assert answers[1:] == [
        "B",
        {"text": "a says False", "beside": "b says True"},
        {"text": "b says True", "beside": "a says False"},
    ]


def test_folders_are_compared_by_content(tmp_path):
    for name, text in (("one", "weights"), ("two", "weights"), ("three", "others")):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "model.safetensors").write_text(text)
    found = {
        n: meaning(RunConfig(base={"model": str(tmp_path / n / "model")}))["base.model"]
        for n in ("one", "two", "three")
    }
    assert found["one"] == found["two"] != found["three"] and found["one"].startswith("model (")
    runs = [
        make(tmp_path, f"run{n}", {1}, base=str(tmp_path / n / "model"), seed=i) for i, n in enumerate(("one", "two"))
    ]
    assert len(side_by_side(runs)["methods"]) == 1


def test_what_cannot_be_compared_is_said(tmp_path):
    a, b = make(tmp_path, "a", {1}), make(tmp_path, "b", {1}, rate=1e-3)
    with pytest.raises(ValueError, match="1 runs are asked for: choose 2 to"):
        side_by_side([a])
    with pytest.raises(ValueError, match="choose 2 to"):
        side_by_side([a] * (MOST_RUNS + 1))
    with pytest.raises(ValueError, match="has no variant 'base'"):
        side_by_side([a, b], "base")
    (b / "evaluation.parquet").unlink()
    with pytest.raises(ValueError, match="latent-control evaluate"):
        side_by_side([a, b])
