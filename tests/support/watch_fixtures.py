"""Runs that a test writes line by line while the page of ``watch`` looks on, without model and training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explorer_data import HOSTILE

from configs.loading import dump_config
from configs.schema import RunConfig
from pipeline.replay.writer import ReplayWriter
from pipeline.runs.layout import CONFIG, REPLAY
from pipeline.runs.metrics_log import RunLog
from pipeline.runs.stage_table import IMPROVE
from pipeline.watch.followed_run import FollowedRuns
from pipeline.watch.web import application
from pipeline.web.guard import new_token
from pipeline.web.server import address_of, listen, server_of
from rollout_workers.rollouts import Rollout

ROOT = Path(__file__).resolve().parents[2]


class RunAtWork:
    """A run folder that grows by ``update``."""

    def __init__(self, folder: Path) -> None:
        config = RunConfig(
            base={"model": str(ROOT / "configs/models/countdown-1m")},
            actions={"num_actions": 8},
            clone={},
            improve={"updates": 50, "evaluate_every": 1, "evaluate_prompts": 100},
            evaluation=None,
            tracking={"enabled": False},
        )
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(dump_config(config))
        self.folder, self.updates = folder, 0
        self.log = RunLog(folder, quiet=True)
        self.replay = ReplayWriter(folder / REPLAY, 4096, f"{folder.name}-{IMPROVE}")

    def update(self, text: str = "7 + 3 = 10", **metrics: float) -> None:
        """The next update: a group of four rollouts with rewards 0, 0, 0 and 1, and a line of metrics."""
        self.replay.add([self.rollout(place, text) for place in range(4)])
        self.updates += 1
        measured = {
            "reward": self.updates / 100,
            "success": self.updates / 100,
            "entropy": 3.0 - self.updates / 100,
            "rollouts_code_perplexity": 8.0 - self.updates / 100,
            "seconds_update_total": 2.0,
            "seconds_sampling": 1.0,
            "worker_seconds": 2.0,
            "worker_seconds_verifying": 0.5,
            "seconds_updating": 0.5,
            "seconds_publishing": 0.25,
            "idle_workers": 0.5,
            "heldout_success": 0.5,
        }
        self.log.log(IMPROVE, self.updates, measured | metrics)

    def rollout(self, place: int, text: str) -> Rollout:
        """Token 7 is "3" in the countdown model's vocabulary."""
        name = f"{self.updates}-{place}"
        return Rollout(
            rollout_id=f"r{name}",
            group_id=f"g{self.updates}",
            prompt_id=f"countdown/train/{self.updates}",
            prompt_text=f"prompt {self.updates} {HOSTILE}",
            text=f"{text} of {name}",
            prompt_tokens=np.array([1], np.int32),
            tokens=np.array([7, 154, 7], np.int32),
            actions=np.array([0, 5, place], np.int32),
            action_logp=np.zeros(3, np.float32),
            finish_reason="stop",
            reward=float(place == 3),
            reward_parts={"success": float(place == 3), HOSTILE: 0.5},
            success=place == 3,
            failure=f"Timeout: {HOSTILE}" if place == 1 else None,
            policy_version=self.updates,
            policy_hash="p",
            world_hash="w",
            codebook_hash="c",
            level="latent",
            seed=1,
            worker=1,
            created=1.7e9,
        )


@pytest.fixture
def run_at_work(tmp_path: Path) -> RunAtWork:
    """A run without a line yet."""
    return RunAtWork(tmp_path / "runs" / "first")


@pytest.fixture
def watching() -> Iterator[Callable[[Path], str]]:
    """``watching(folder)``: the address of its page without the last slash, up until the test ends."""
    started: list[Any] = []

    def serve(folder: Path) -> str:
        listener, token, ending = listen("127.0.0.1", None), new_token(), threading.Event()
        server = server_of(application(FollowedRuns(folder), "127.0.0.1", token, ending), ending)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        started.append((server, thread, ending))
        while not server.started:
            time.sleep(0.01)
        return address_of(listener, token).removesuffix("/")

    yield serve
    for server, thread, ending in started:
        ending.set()
        server.should_exit = True
        thread.join(20)
