"""A finished run of the whole pipeline, made once for all processes. Test modules name this in ``pytest_plugins``."""

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


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shortened quickstart, one for all processes of ``pytest -n``. Do not change it."""
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
