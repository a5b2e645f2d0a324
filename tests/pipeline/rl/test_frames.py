"""How many functions of ours lie between the command and the learner's update."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import pipeline
from latent_control.pretrained import read_config
from learners.learner import PolicyLearner
from pipeline.cli.main import main

pytest_plugins = ("rl_fixtures",)
ROOT = Path(pipeline.__file__).resolve().parents[1]
PACKAGES = ("configs", "latent_control", "rollout_workers", "learners", "pipeline")


class Here(Exception):
    """Raised by the learner in its update."""


def own_frames(frames: Iterable[traceback.FrameSummary]) -> list[str]:
    """ "file:function" of each frame that lies in a package of ours."""
    inside = [frame for frame in frames if any(Path(frame.filename).is_relative_to(ROOT / name) for name in PACKAGES)]
    return [f"{Path(frame.filename).relative_to(ROOT).as_posix()}:{frame.name}" for frame in inside]


def test_frames_of_others_do_not_count() -> None:
    files = ["pipeline/cli/main.py", "tests/pipeline/x.py", "/lib/typer/core.py", "learners/learner.py"]
    frames = [traceback.FrameSummary(str(ROOT / file), 1, "f") for file in files]
    assert own_frames(frames) == ["pipeline/cli/main.py:f", "learners/learner.py:f"]


def test_few_frames_lie_between_the_command_and_the_update(
    ray_session: None, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: PolicyLearner, part: Any) -> Any:
        raise Here

    monkeypatch.setattr(PolicyLearner, "_backward", stop)
    # What ``main`` would leave behind in this process.
    monkeypatch.setattr("pipeline.runs.interrupts.end_on_signals", lambda: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(logging, "lastResort", None)
    shape = read_config(tiny_checkpoint)["latent_actions"]
    layers = ", ".join(f"{part}: {shape[part]}" for part in shape if part.endswith("_layers"))
    (tmp_path / "config.yaml").write_text("improve: {}\n")
    settings = [
        f"base.model={tiny_checkpoint.parent / 'base'}",
        f"actions={{init: {tiny_checkpoint}, updates: 0, min_alive_share: 0, {layers}}}",
        *("evaluation=null", "explorer.enabled=false", "tracking.enabled=false", "cluster.num_learners=0"),
        *("improve.prompts_per_update=2", "improve.group_size=2", "rollout.num_workers=1", "rollout.max_new_tokens=4"),
    ]
    command = ["run", str(tmp_path / "config.yaml"), *settings, "--run-dir", str(tmp_path / "run"), "--quiet"]
    monkeypatch.setattr(sys, "argv", ["latent-control", *command])
    with pytest.raises(Here) as found:
        main()
    frames = own_frames(traceback.extract_tb(found.tb))
    assert (frames[0], frames[-1]) == ("pipeline/cli/main.py:main", "learners/learner.py:_update")
    assert len(frames) <= 8, frames
