"""Finished runs of the whole pipeline, each made once for all processes. Test modules name this in
``pytest_plugins``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def command(*arguments: str) -> list[str]:
    """The program as users start it."""
    return [sys.executable, "-m", "pipeline", *arguments]


def call(*arguments: str, timeout: float = 590) -> str:
    """What a command that succeeds prints."""
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{arguments} -> {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that ``make`` fills, by one of the processes of ``pytest -n``; the others wait. Do not change what is
    in it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(folder.with_suffix(".lock")):
        if not (done := folder.with_suffix(".done")).exists():
            make(folder)
            done.touch()
    return folder


FEW = [
    *("actions.updates=40", "actions.evaluation_sequences=32", "actions.min_alive_share=0"),
    *("clone.updates=20", "clone.evaluation_sequences=32"),
    *("improve.updates=6", "improve.checkpoint_every=3", "replay.rows_per_shard=256", "rollout.num_workers=1"),
    *("evaluation.prompts=32", "evaluation.marginal_sequences=16", "explorer.seconds=0", "cluster.learner_threads=1"),
]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages of the quickstart in a few steps, which teach it little: for what a run leaves behind. Made in the
    process that asks first. Do not change it."""

    def make(folder: Path) -> None:
        from configs.loading import load_config
        from pipeline.cluster.connect import joined
        from pipeline.run import run

        with joined("local", 2):  # one for all stages: the tests' own where they have started it
            run(load_config(Path(QUICKSTART), FEW), folder / "first")

    return once(tmp_path_factory, "small", make) / "first"


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shortened quickstart that learns, minutes long: for slow tests. Do not change it."""
    shorter = [
        "actions.updates=150",
        "clone.updates=100",
        "improve.updates=30",
        "evaluation.prompts=128",
        "cluster.learner_threads=1",
    ]
    shorter += ["explorer.seconds=1", "replay.rows_per_shard=2048"]  # two shards
    return (
        once(
            tmp_path_factory,
            "learned",
            lambda folder: call("run", QUICKSTART, *shorter, "--run-dir", str(folder / "first")),
        )
        / "first"
    )
