"""Ends learner actors that are silent for too long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from pipeline.rl.rllib_private import actors_of


class LearnerTimeout:
    """``with timeout.watch(): ...``: learner actors that have not answered within ``seconds`` are killed, which those
    who wait for them see as a loss. A learner in this process is not watched."""

    def __init__(self, group: Any, seconds: float, report: Callable[[str], None]) -> None:
        self.group, self.seconds, self.report = group, seconds, report

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the learners for the length of a block."""
        timer = threading.Timer(self.seconds, self._kill)
        timer.daemon = True
        if self.group.is_remote:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def all_healthy(self) -> bool:
        """Whether RLlib knows of no learner that is lost."""
        return not self.group.is_remote or actors_of(self.group).num_healthy_actors() >= len(self.group)

    def _kill(self) -> None:
        learners = actors_of(self.group).actors()
        silent = f"the {len(learners)} learner actors have" if len(learners) > 1 else "the learner actor has"
        self.report(
            f"{silent} not answered for {self.seconds:g} s; raise cluster.learner_timeout_seconds if that is not long "
            "enough"
        )
        for actor in learners.values():
            ray.kill(actor)
