"""Hands requests to the rollout workers and gets every one of them answered, whatever happens to the workers."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from operator import methodcaller
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError

from configs.schema import Cluster, RunConfig
from pipeline.rl.rllib_private import actors_of
from pipeline.rl.worker_health import Health, WorkerWatch
from pipeline.runs import interrupts
from pipeline.runs.errors import RunError, first_line
from rollout_workers.rollouts import RolloutRequest, RolloutSummary

# A request that has cost this many workers their life is at fault itself.
MOST_LOSSES = 3


class PartLost(RunError):
    """Something that a run needs went with its process or node; rebuilt from the newest checkpoint, the run loses and
    doubles nothing."""


@dataclass(frozen=True, kw_only=True)
class FinishedRequest:
    """A finished request: where its rollouts lie, and what they are like."""

    request: RolloutRequest
    rollouts: ray.ObjectRef
    summary: RolloutSummary
    attempt: int = 0
    """How many times the request was handed out before."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """RLlib's, of the call."""
    left_out: frozenset[int] = frozenset()
    """Numbers of its groups that the update does not train on."""

    @property
    def equal_rewards(self) -> list[bool]:
        """Of each group: whether its judged rewards are all equal, or fewer than two."""
        size, rewards = self.request.group_size, self.summary.rewards
        groups = (rewards[first : first + size] for first in range(0, len(rewards), size))
        return [len({reward for reward in group if not math.isnan(reward)}) < 2 for group in groups]

    @property
    def trained(self) -> int:
        """How many of its rollouts the update trains on."""
        return self.summary.rollouts - len(self.left_out) * self.request.group_size

    def training_rollouts(self) -> ray.ObjectRef:
        """Those rollouts."""
        if not self.left_out:
            return self.rollouts
        size = self.request.group_size
        return ray.put([r for n, r in enumerate(ray.get(self.rollouts)) if n // size not in self.left_out])

    def lost(self, reason: str) -> LostRequest:
        """The record of its loss."""
        return LostRequest(request=self.request, attempt=self.attempt, worker=self.summary.worker, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A call that a worker is at, for one request or several."""

    worker: int
    requests: tuple[RolloutRequest, ...]
    rollouts: tuple[ray.ObjectRef, ...]
    """Of each request"""
    attempts: tuple[int, ...]

    def finished(self, place: int, summary: RolloutSummary, metrics: dict[str, Any]) -> FinishedRequest:
        """Its request number ``place``, answered."""
        return FinishedRequest(
            request=self.requests[place],
            rollouts=self.rollouts[place],
            summary=summary,
            attempt=self.attempts[place],
            metrics=metrics,
        )


@dataclass(frozen=True, kw_only=True)
class LostRequest:
    """A request that came to nothing in a worker's hands, and is queued again."""

    request: RolloutRequest
    attempt: int
    worker: int
    reason: str


def this_node() -> str:
    """Ray's name of the node this process runs on."""
    node: str = ray.get_runtime_context().get_node_id()
    return node


def is_lost(finished: FinishedRequest, node: str) -> bool:
    """Whether the rollouts went with their node; fetching them to ``node`` also keeps them, whatever happens from now
    on."""
    if node in ("", finished.summary.node):
        return False
    try:
        ray.get(finished.rollouts)
    except ObjectLostError:
        return True
    return False


class RolloutPool:
    """Requests in, answers out, over an RLlib ``EnvRunnerGroup``.

    A lost worker's requests go back to their place in the queue; RLlib restarts the worker. An exception inside a
    worker is a bug or a user's error and is raised here as it is. Rollouts are return values of the workers' calls, so
    this process owns them: they outlive the worker that made them (what a worker itself puts into the object store dies
    with it). A lost node takes them along: ``take`` fetches those that do not lie on the driver's ``node``.
    """

    def __init__(
        self,
        group: Any,
        *,
        timeout: float,
        stamp: Callable[[RolloutRequest], RolloutRequest] = lambda request: request,
        in_flight: int = 2,
        node: str = "",
        health: Health | None = None,
    ) -> None:
        self.workers, self.restore = actors_of(group), group.probe_unhealthy_env_runners
        self.stamp, self.in_flight, self.node = stamp, in_flight, node
        self.watch = WorkerWatch(self.workers, timeout=timeout, health=health or Health(Cluster()))
        self.waiting: deque[RolloutRequest] = deque()
        self.running: dict[ray.ObjectRef, Running] = {}
        """By the reference to the call's (summary, metrics), in the order of sending."""
        self.finished: dict[int, FinishedRequest] = {}
        self.losses: Counter[int] = Counter()
        self.lost: list[LostRequest] = []
        """Lost since the last ``take_lost``."""
        self._handed: Counter[int] = Counter()

    def keep_policies(self) -> None:
        """Sample every request with the policy it names, not with the newest one."""
        self.stamp = lambda request: request

    def most_workers(self, config: RunConfig) -> int:
        """Workers that may ever come: work is cut for that number, so that results do not depend on when they do."""
        return max(config.most_workers, len(self.workers.actor_ids()))

    def submit(self, requests: Iterable[RolloutRequest]) -> None:
        """Queue requests; they start as workers are free."""
        self.waiting.extend(requests)
        self._dispatch()

    def take(self, request_ids: Iterable[int]) -> list[FinishedRequest]:
        """Wait for these requests and return them in the given order; raises what ``take_when`` raises."""
        wanted = list(request_ids)
        return self.take_when(lambda: wanted if all(i in self.finished for i in wanted) else None)

    def take_when(self, choose: Callable[[], list[int] | None]) -> list[FinishedRequest]:
        """Poll until ``choose`` names finished requests, and return them in its order.

        Raises:
            TimeoutError: no worker came back in time.
            RunError: a request was lost with its worker too often, or workers die too often (``worker_health``).
            Stopped: the run was asked to end.
        """
        while True:
            while (chosen := choose()) is None:
                interrupts.check()  # here nothing is half done; in ``poll`` a learner may be at work
                self.poll(0.1)
            lost = [i for i in chosen if is_lost(self.finished[i], self.node)]
            if not lost:
                for i in chosen:
                    del self._handed[i]
                return [self.finished.pop(i) for i in chosen]
            gone = [self.finished.pop(i) for i in lost]
            self.lost += [one.lost("its rollouts went with their node") for one in gone]
            self._requeue([one.request for one in gone])

    def stop(self) -> None:
        """Let the workers go; RLlib would wait for what they are at."""
        self.workers.clear()

    def take_lost(self) -> list[LostRequest]:
        """What was lost since the last call."""
        lost, self.lost = self.lost, []
        return lost

    def release(self, worker: int) -> Any:
        """Take a worker out of the group, and what it has in its hands back into the queue; returns its handle."""
        self._requeue(chain(*(call.requests for call in self._take_back(worker, "its worker was stopped"))))
        return self.watch.remove(worker)

    def stamps(self) -> dict[int, int | None]:
        """Every open request's policy version, ``None`` while it waits for a worker."""
        handed_out = [request for call in self.running.values() for request in call.requests]
        handed_out += [one.request for one in self.finished.values()]
        waiting: dict[int, int | None] = {request.request_id: None for request in self.waiting}
        return waiting | {request.request_id: request.policy.version for request in handed_out if request.policy}

    def forget(self) -> None:
        """Drop all requests; what a worker is at is finished and thrown away."""
        for held in (self.waiting, self.running, self.finished, self.losses, self.lost, self._handed, self.watch.loads):
            held.clear()

    def poll(self, seconds: float = 0.0) -> None:
        """Fetch what is finished, waiting up to ``seconds`` for the first of it, requeue what was lost, keep the
        workers busy."""
        if not self.running:
            time.sleep(min(seconds, 0.01))
        elif seconds:
            ray.wait(list(self.running), num_returns=1, timeout=seconds)
        if self.running:
            ready, _ = ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
            self._collect(ready)
        self._restart_silent()
        self.watch.recycle()
        self.restore()  # asks the workers that are down only
        self._dispatch()
        self.watch.check_stuck([] if self.running else [request.request_id for request in self.waiting])

    def _restart_silent(self) -> None:
        """A worker that has not answered in time is killed, and counts as one that died."""
        for worker in self.watch.silent():
            calls = [call for call in self.running.values() if call.worker == worker]
            requests = [request.request_id for call in calls for request in call.requests]
            self._lose(worker, self.watch.end_silent(worker, requests))

    def _dispatch(self) -> None:
        """Everybody gets one request before anybody gets two."""
        if not self.waiting:
            return
        able = self.watch.able()
        for depth in range(self.in_flight):
            for worker in able:
                if self.waiting and self.watch.loads[worker] <= depth:
                    self._send(worker, tuple(map(self.stamp, self._next_call())))

    def _next_call(self) -> list[RolloutRequest]:
        """What one worker gets next, out of the queue."""
        return [self.waiting.popleft()]

    def _work(self, requests: tuple[RolloutRequest, ...]) -> Any:
        """What a worker is to do for a call; it returns the rollouts of each request, then what the driver sees."""
        return methodcaller("sample_request", requests[0])

    def _send(self, worker: int, requests: tuple[RolloutRequest, ...]) -> None:
        call = self.workers.actors()[worker].apply.options(num_returns=len(requests) + 1)
        *rollouts, report = call.remote(self._work(requests))
        attempts = tuple(self._handed[request.request_id] for request in requests)
        self._handed.update(request.request_id for request in requests)
        self.running[report] = Running(worker=worker, requests=requests, rollouts=tuple(rollouts), attempts=attempts)
        self.watch.sent(worker)

    def _collect(self, ready: list[ray.ObjectRef]) -> None:
        for report in ready:
            if (call := self.running.get(report)) is None:
                continue  # lost with its worker a moment ago
            try:
                answers = self._answers(ray.get(report))
            except RayActorError as error:
                self._lose(call.worker, error)
                continue
            self.running.pop(report)
            self.watch.received(call.worker)
            for place, (summary, metrics) in enumerate(answers):
                del self.losses[call.requests[place].request_id]
                self.watch.health.answered(call.worker, summary.gib)
                self._finish(call.finished(place, summary, metrics))

    def _answers(self, report: Any) -> list[tuple[RolloutSummary, dict[str, Any]]]:
        """What a call's report says of each of its requests."""
        return [report]

    def _finish(self, finished: FinishedRequest) -> None:
        self.finished[finished.request.request_id] = finished

    def _lose(self, worker: int, error: Exception) -> None:
        """All that lay in a dead worker's hands is queued again; the first call is the one it was working on."""
        self.workers.set_actor_state(worker, healthy=False)
        calls = self._take_back(worker, f"its worker was lost: {first_line(error)}")
        self.losses.update(blamed.request_id for blamed in calls[0].requests)
        self._requeue(chain(*(call.requests for call in calls)))
        for blamed in calls[0].requests:
            if self.losses[blamed.request_id] >= MOST_LOSSES:
                self._give_up(blamed, error)
        self.watch.died(worker, first_line(error))

    def _give_up(self, request: RolloutRequest, error: Exception) -> None:
        """A request has cost too many workers their life."""
        what = f"request {request.request_id} (prompts {request.prompt_indices})"
        raise RunError(f"{what} was lost with its worker {MOST_LOSSES} times; last: {first_line(error)}") from error

    def _take_back(self, worker: int, why: str) -> list[Running]:
        """What is in a worker's hands, first come first."""
        reports = [report for report, call in self.running.items() if call.worker == worker]
        calls = [self.running.pop(report) for report in reports]
        for call in calls:
            self.watch.received(worker)
            for request, attempt in zip(call.requests, call.attempts, strict=True):
                self._note_lost(LostRequest(request=request, attempt=attempt, worker=worker, reason=why))
        return calls

    def _note_lost(self, lost: LostRequest) -> None:
        self.lost.append(lost)

    def _requeue(self, requests: Iterable[RolloutRequest]) -> None:
        """Put requests back to their place in the queue."""
        self.waiting = deque(sorted([*requests, *self.waiting], key=lambda request: request.request_id))
