"""What the chaos tests share: a whole run in a process of its own, whose parts can be found and hurt. Only own
processes are touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from safetensors.torch import load_file

from latent_control.pretrained import read_config
from pipeline.integrity.audit import audit

ROOT = Path(__file__).resolve().parents[2]
UPDATES, PROMPTS, GROUP, EVERY = 14, 4, 4, 4
WORKER, LEARNER, REPLAY = "ray::LMEnvRunner", "ray::_WrappedExecutable", "ray::ReplayActor"
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


class Run:
    """``latent-control run`` or ``resume`` on a tiny model with random weights, whose responses are rewarded for their
    length."""

    def __init__(self, folder: Path, checkpoint: Path, *overrides: str, updates: int = UPDATES) -> None:
        self.folder, self.process, self.family = folder, None, list[psutil.Process]()
        shape = read_config(checkpoint)["latent_actions"]
        layers = ", ".join(
            f"{part}_layers: {shape[f'{part}_layers']}" for part in ("inverse_dynamics", "merge", "policy")
        )
        self.settings = [
            f"base.model={checkpoint.parent / 'base'}",
            f"actions={{init: {checkpoint}, updates: 0, min_alive_share: 0, {layers}}}",
            *("evaluation=null", "explorer.enabled=false", "reward.weights={length: -1.0}"),
            *(f"improve.updates={updates}", f"improve.prompts_per_update={PROMPTS}", f"improve.group_size={GROUP}"),
            *(
                f"improve.checkpoint_every={EVERY}",
                "improve.learning_rate=0.01",
                "rollout.num_workers=2",
                "rollout.max_new_tokens=6",
            ),
            *("cluster.learner_threads=1", "cluster.restart_seconds=0.2"),
            *overrides,
        ]

    def start(self) -> Run:
        """Begin, or go on where the folder has a run already."""
        config = self.folder.parent / f"{self.folder.name}.yaml"
        config.write_text("improve: {}\n")
        begin = ["run", str(config), *self.settings, "--run-dir", str(self.folder)]
        arguments = ["resume", str(self.folder)] if (self.folder / "config.yaml").is_file() else begin
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (self.folder.parent / f"{self.folder.name}.log").open("a") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "pipeline", *arguments],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        return self

    def actors(self, name: str) -> list[psutil.Process]:
        """The run's own actors whose process title begins so; busy ones add what they are at."""
        return self._titled(lambda title: title.startswith(name))

    def _titled(self, wanted: Callable[[str], bool]) -> list[psutil.Process]:
        assert self.process is not None
        found = []
        for child in self.process.children(recursive=True):
            try:
                if wanted(" ".join(child.cmdline())):
                    found.append(child)
            except psutil.Error:
                continue
        return sorted(found, key=lambda child: child.pid)

    def reach(self, update: int, seconds: float = 900.0) -> None:
        """Wait until ``improve`` has logged this update."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while not any(step >= update for step in self.steps()):
            assert self.process.poll() is None, f"it ended before update {update}:\n{self.words()}"
            assert time.monotonic() < deadline, f"update {update} was not reached:\n{self.words()}"
            time.sleep(0.02)

    def steps(self) -> list[int]:
        """The updates in ``metrics.jsonl``."""
        return [record["step"] for record in self.metrics()]

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of ``improve``."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [one for one in (json.loads(line) for line in lines if line.endswith("\n")) if one["stage"] == "improve"]

    def end(self, expected: int = 0, seconds: float = 900.0) -> float:
        """Wait for the end; returns how long that took. No process of the run may be left ten seconds later (after kill
        -9 but for Ray's two agents and a worker that was only starting, which take a minute or two to notice)."""
        assert self.process is not None
        family = self.family or self._titled(lambda title: True)
        begun = time.monotonic()
        code = self.process.wait(seconds)
        took = time.monotonic() - begun
        self.family = []
        assert code == expected, f"exit code {code}, expected was {expected}:\n{self.words()}"
        _, left = psutil.wait_procs(family, timeout=10)
        assert not left, f"still there: {[(one.pid, one.cmdline()) for one in left]}"
        return took

    def words(self) -> str:
        """The end of what it said."""
        return (self.folder.parent / f"{self.folder.name}.log").read_text()[-3000:]

    def signal(self, number: int = signal.SIGKILL) -> None:
        """Send the driver a signal. Whose child a process was can be known only before."""
        assert self.process is not None
        everything = number != signal.SIGKILL
        self.family = self._titled(
            lambda title: everything or (title.startswith("ray::") and not title.startswith(AGENTS))
        )
        self.process.send_signal(number)

    def weights(self) -> dict[str, torch.Tensor]:
        """Of the stage's result."""
        found: dict[str, torch.Tensor] = load_file(
            self.folder / "checkpoints" / "improve" / "latent_actions.safetensors"
        )
        return found

    def rollouts(self) -> pd.DataFrame:
        """The replay buffer."""
        return pd.read_parquet(self.folder / "replay")


@contextmanager
def running(*runs: Run) -> Iterator[None]:
    """Whatever comes, nothing of these runs is left at work."""
    try:
        yield
    finally:
        for run in runs:
            if run.process is not None and run.process.poll() is None:
                family = run.process.children(recursive=True)
                for process in [run.process, *family]:
                    with_no_error(process)


def with_no_error(process: psutil.Process) -> None:
    """Kill what may be gone already."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def assert_undisturbed(run: Run, whole: Run, updates: int = UPDATES) -> None:
    """Bit for bit the end of a run that nothing befell, every rollout consumed and stored once, and the audit
    agrees."""
    found, expected = run.weights(), whole.weights()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert run.steps() == list(range(1, updates + 1))
    assert [r["reward"] for r in run.metrics()] == [r["reward"] for r in whole.metrics()][:updates]
    assert_whole(run, updates)
    assert set(run.rollouts().rollout_id) == set(whole.rollouts().rollout_id)


def assert_whole(run: Run, updates: int) -> None:
    """The right number of updates and rollouts, none lost or doubled."""
    stored = run.rollouts()
    assert stored.rollout_id.is_unique and len(stored) == updates * PROMPTS * GROUP
    assert run.steps() == list(range(1, updates + 1))
    assert [one for one in audit(run.folder) if not one.passed] == []
