"""One rule for all readers of metrics.jsonl: a line whose checksum fails is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.loading import dump_config
from configs.schema import RunConfig
from pipeline.experiments import pilot, tune_codes
from pipeline.experiments.codebook_score import CodesTrial
from pipeline.experiments.compare import read_run
from pipeline.experiments.sweep import measured
from pipeline.runs.layout import CONFIG, METRICS, SUMMARY
from pipeline.runs.metrics_log import RunLog, records, series
from pipeline.runs.status import overview

REWARDS = (0.2, 0.2, 0.4)
SETTINGS = {
    "num_actions": 32,
    "span": 1,
    "temperature": 1.0,
    "inverse_dynamics_layers": 2,
    "policy_layers": 2,
}


def run_folder(folder: Path) -> Path:
    """A run of three updates whose second logged line says 9.2 where 0.2 was written."""
    folder.mkdir()
    config = RunConfig(base={"model": "x"}, actions={}, clone={}, improve={}, tracking={"enabled": False})
    (folder / CONFIG).write_text(dump_config(config))
    (folder / SUMMARY).write_text(json.dumps({"stages": {}}))
    log = RunLog(folder, quiet=True)
    for step, reward in enumerate(REWARDS, 1):
        log.log("improve", step, {"reward": reward, "rollouts": 8})
    log.close()
    return changed(folder, 1, '"reward": 0.2', '"reward": 9.2')


def changed(folder: Path, number: int, before: str, after: str) -> Path:
    """The run folder with another text in one line of its log."""
    lines = (folder / METRICS).read_text().splitlines(keepends=True)
    assert before in lines[number]
    lines[number] = lines[number].replace(before, after)
    (folder / METRICS).write_text("".join(lines))
    return folder


def test_the_readers_of_the_log_pass_over_a_changed_line(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    assert [record["step"] for record in records(folder / METRICS)] == [1, 3]
    assert series(folder / METRICS, "improve", "reward") == [0.2, 0.4]
    assert overview(folder).reward == 0.4


def test_compare_passes_over_a_changed_line(tmp_path: Path) -> None:
    assert [point["reward"] for point in read_run(run_folder(tmp_path / "run"), "improved").curve] == [0.2, 0.4]


def test_sweep_passes_over_a_changed_line(tmp_path: Path) -> None:
    assert measured(run_folder(tmp_path / "run"), "reward")[0] == pytest.approx(0.3)


def test_pilot_passes_over_a_changed_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, quiet=True)
    for step in (1, 2, 3):
        for stage in pilot.FULL:
            log.log(stage, step, {"loss": 0.5})
    log.close()
    changed(tmp_path, -1, '"time": ', '"time": 9')
    assert pilot.measure(tmp_path, 1.0).update == pytest.approx(dict.fromkeys(pilot.FULL, 0.0), abs=60.0)


def test_tune_codes_passes_over_a_changed_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_codes, "run", lambda config, folder, display: run_folder(folder))
    config = RunConfig(base={"model": "x"}, actions={}, clone={}, improve={})
    trial = CodesTrial(settings=SETTINGS, measures={}, score=0.3, updates=1, cloned=True)
    (played,) = tune_codes.decide(config, [trial], tmp_path, updates=3, deadline=0.0, say=lambda text: None)
    assert played.reward is not None and played.reward["mean"] == pytest.approx(0.3)
