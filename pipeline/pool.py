"""Hands requests to the rollout workers and gets every one of them answered, whatever happens to the workers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from rollout_workers.episodes import RolloutRequest, RolloutSummary

TAG = "sample"
# A request that has cost this many workers their life is at fault itself.
MOST_LOSSES = 3


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished request: where its rollouts lie, and what they are like."""

    request: RolloutRequest
    rollouts: ray.ObjectRef
    summary: RolloutSummary


class RolloutPool:
    """Requests in, answers out, over an RLlib ``EnvRunnerGroup``.

    A lost worker's requests go back to the head of the queue; RLlib restarts the worker. An exception inside a worker is
    a bug or a user's error and is raised here as it is.
    """

    def __init__(self, group: Any, *, restore: Callable[[], Any], timeout: float, in_flight: int = 2) -> None:
        self.group, self.restore, self.timeout, self.in_flight = group, restore, timeout, in_flight
        self.waiting: deque[RolloutRequest] = deque()
        self.assigned: dict[int, list[RolloutRequest]] = {}
        self.answers: dict[int, Answer] = {}
        self.losses: dict[int, int] = {}
        self.metrics: list[dict[str, Any]] = []
        self.last_answer = time.monotonic()

    def submit(self, requests: Iterable[RolloutRequest]) -> None:
        """Queue requests; they start as workers are free."""
        if not self.waiting and not self.assigned:
            self.last_answer = time.monotonic()
        self.waiting.extend(requests)
        self._dispatch()

    def take(self, request_ids: Iterable[int]) -> list[Answer]:
        """Wait for these requests and return their answers in the given order.

        Raises:
            RuntimeError: no worker answered within the timeout, or a request was lost with its worker too often.
        """
        wanted = list(request_ids)
        while not all(i in self.answers for i in wanted):
            self.poll(0.01)
        return [self.answers.pop(i) for i in wanted]

    def poll(self, seconds: float = 0.0) -> None:
        """Fetch what is finished, requeue what was lost, and keep the workers busy."""
        for result in self.group._worker_manager.fetch_ready_async_reqs(tags=TAG, timeout_seconds=seconds):
            if result.ok:
                self._finish(result.actor_id, *result.get())
            elif isinstance(error := result.get(), RayActorError):
                self._lose(result.actor_id, error)
            else:
                raise error
        self.restore()
        self._dispatch()
        if self.assigned and time.monotonic() - self.last_answer > self.timeout:
            silent = {worker: [r.request_id for r in requests] for worker, requests in self.assigned.items()}
            raise RuntimeError(
                f"no rollout worker has answered for {self.timeout:.0f} s; waiting for {{worker: requests}} {silent}: "
                "raise cluster.worker_timeout_seconds, or look into these actors' logs"
            )

    def _dispatch(self) -> None:
        for _ in range(self.in_flight):
            for worker in self.group.healthy_worker_ids():
                if self.waiting and len(self.assigned.get(worker, ())) < self.in_flight:
                    self._send(worker)

    def _send(self, worker: int) -> None:
        request = self.waiting.popleft()
        sent = self.group.foreach_env_runner_async("sample_request", tag=TAG, kwargs=[{"request": request}], remote_worker_ids=[worker])
        if sent:
            self.assigned.setdefault(worker, []).append(request)
        else:
            self.waiting.appendleft(request)

    def _finish(self, worker: int, rollouts: ray.ObjectRef, summary: RolloutSummary, metrics: dict[str, Any]) -> None:
        request = next(r for r in self.assigned[worker] if r.request_id == summary.request_id)
        self.assigned[worker].remove(request)
        if not self.assigned[worker]:
            del self.assigned[worker]
        self.answers[request.request_id] = Answer(request=request, rollouts=rollouts, summary=summary)
        self.metrics.append(metrics)
        self.last_answer = time.monotonic()

    def _lose(self, worker: int, error: RayActorError) -> None:
        """RLlib forgets everything in flight at a dead actor, so all of it is queued again."""
        lost = self.assigned.pop(worker, [])
        for request in reversed(lost):
            self.losses[request.request_id] = self.losses.get(request.request_id, 0) + 1
            if self.losses[request.request_id] >= MOST_LOSSES:
                raise RuntimeError(
                    f"request {request.request_id} (prompts {request.prompt_indices}) was lost with its worker {MOST_LOSSES} times; "
                    f"last: {error}"
                ) from error
            self.waiting.appendleft(request)
