"""``runs`` and ``show``: what a run folder tells without opening a model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.cli.options import USAGE
from pipeline.runs.layout import PROCESS
from pipeline.runs.process import SILENT_SECONDS, at_work
from pipeline.runs.status import overview, runs_in

COUNTDOWN = (Path(__file__).resolve().parents[3] / "configs" / "countdown.yaml").read_text()


def call(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def make(folder: Path, *, stages: int = 3, evaluation: bool = True, steps: int = 150) -> Path:
    """A quickstart run with so many finished stages."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(COUNTDOWN)
    done = {
        name: {"seconds": 20.0, "checkpoint": "x", "metrics": {}} for name in ("actions", "clone", "improve")[:stages]
    }
    found = (
        {"base": {"sampled": 0.2, "greedy": 0.6}, "improved": {"sampled": 0.7, "greedy": 0.7}} if evaluation else None
    )
    (folder / "summary.json").write_text(json.dumps({"stages": done} | ({"evaluation": found} if found else {})))
    lines = [
        {"stage": "improve", "step": step, "time": 1000.0 + step, "reward": step / 1000} for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "improve", "st'
    )
    return folder


def test_a_finished_run(tmp_path: Path) -> None:
    found = overview(make(tmp_path / "a"))
    assert (found.status, found.stage, found.step, found.total) == ("finished", "improve", 150, 150)
    assert (found.reward, found.success, found.variant, found.seconds, found.modified) == (
        0.15,
        0.7,
        "improved",
        60.0,
        1150.0,
    )


def test_running_or_interrupted_is_a_matter_of_the_process(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", stages=2, evaluation=False, steps=40)
    assert overview(folder).status == "interrupted"
    with at_work(folder):
        assert overview(folder).status == "running"
    assert not (folder / PROCESS).exists()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (folder / PROCESS).write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid, "started": 0}))
    assert overview(folder).status == "interrupted"
    # Of another machine's process only its silence can be known.
    for started, status in ((time.time(), "running"), (time.time() - 2 * SILENT_SECONDS, "interrupted")):
        (folder / PROCESS).write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "started": started}))
        assert overview(folder).status == status


def test_the_newest_comes_first_and_damage_is_said(tmp_path: Path) -> None:
    make(tmp_path / "old", steps=10)
    make(tmp_path / "new", steps=20)
    broken = make(tmp_path / "broken")
    (broken / "config.yaml").write_text("improve: [1")
    found = runs_in(tmp_path)
    assert [run.folder.name for run in found] == ["new", "old", "broken"]
    assert found[-1].status.startswith("unreadable: ")
    with pytest.raises(ValueError, match="no run folder"):
        runs_in(broken)


def test_commands(tmp_path: Path) -> None:
    make(tmp_path / "a", stages=2, evaluation=False, steps=40)
    told = call("runs", str(tmp_path))
    assert told.exit_code == 0 and "interrupted" in told.output and "40/150" in told.output
    assert json.loads(call("runs", str(tmp_path), "--json").stdout)[0]["step"] == 40
    told = call("show", str(tmp_path / "a"))
    assert told.exit_code == 0 and "latent-control resume" in told.output and "150 grpo updates" in told.output
    assert call("runs", str(tmp_path / "nothing")).exit_code == USAGE
    assert call("show", str(tmp_path)).exit_code == USAGE
