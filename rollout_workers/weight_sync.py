"""Where the newest policy is announced, for rollouts in flight: workers look at it between two tokens and never wait
for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

from rollout_workers.rollouts import PolicyVersion

LOOK_EVERY = 0.05  # seconds


class PolicyBoard:
    """A Ray actor that holds the newest published policy. After a restart it is empty until the next one."""

    def __init__(self) -> None:
        self.policy: PolicyVersion | None = None

    def publish(self, policy: PolicyVersion) -> None:
        """Put up ``policy``, whatever was there."""
        self.policy = policy

    def newer(self, version: int) -> PolicyVersion | None:
        """The policy, if it is newer than ``version``."""
        return self.policy if self.policy is not None and self.policy.version > version else None


def make_board() -> Any:
    """Start a board that survives what it can."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(PolicyBoard).remote()


class Follower:
    """Called between decoding steps; calls ``use`` as soon as newer weights are there, returns the version in force."""

    def __init__(self, board: Any, version: int, use: Callable[[PolicyVersion], None]) -> None:
        self.board, self.version, self.use = board, version, use
        self.next_look = 0.0
        self.asked: ray.ObjectRef | None = None
        self.coming: PolicyVersion | None = None

    def __call__(self) -> int:
        """The policy version for the tokens to come."""
        if time.monotonic() < self.next_look:
            return self.version
        self.next_look = time.monotonic() + LOOK_EVERY
        if self.asked is not None and ray.wait([self.asked], timeout=0)[0]:
            self.coming, self.asked = ray.get(self.asked), None
        if self.coming is not None:
            self._arrive(self.coming)
        elif self.asked is None:
            self.asked = self.board.newer.remote(self.version)
        return self.version

    def _arrive(self, policy: PolicyVersion) -> None:
        """Use the weights once they are on this node; asking fetches them."""
        if ray.wait([policy.weights], timeout=0)[0]:
            self.use(policy)
            self.version, self.coming = policy.version, None
