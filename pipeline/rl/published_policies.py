"""The policies that a run has published: the newest, and the hashes of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray

from rollout_workers.rollouts import PolicyVersion, RolloutRequest
from rollout_workers.weight_sync import make_board


class PublishedPolicies:
    """Holds the policy that new requests are sampled with; ``add`` one before anything reads ``current``."""

    current: PolicyVersion

    def __init__(self) -> None:
        self.hashes: dict[int, str] = {}
        """Hash of the weights by version."""
        self.board: Any = None
        """Where rollouts in flight look for newer policies; ``None``: they finish with the policy they began with."""

    def add(self, policy: PolicyVersion, *, refresh_in_flight: bool = False) -> None:
        """Make ``policy`` the current one."""
        self.current = policy
        self.hashes[policy.version] = policy.weights_hash
        self.board = (self.board or make_board()) if refresh_in_flight else None
        if self.board is not None:
            self.board.publish.remote(policy)

    def stamp(self, request: RolloutRequest) -> RolloutRequest:
        """``request`` with the current policy, however long it has waited for a worker."""
        return replace(request, policy=self.current)

    def stop(self) -> None:
        """Stop the board's actor."""
        if self.board is not None:
            ray.kill(self.board)
