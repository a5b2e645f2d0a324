"""Hands requests to the rollout workers and gets every one of them answered, whatever happens to the workers."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError

from configs.schema import Cluster
from pipeline.rl.worker_health import Health
from pipeline.runs import interrupts
from pipeline.runs.errors import RunError, first_line
from pipeline.runs.events import Say
from rollout_workers.rollouts import RolloutRequest, RolloutSummary

# A request that has cost this many workers their life is at fault itself.
MOST_LOSSES = 3
COMING_BACK = 300.0
"""Seconds that workers which are all down at once have at least to come back: a restart loads the base LM anew."""


class PartLost(RunError):
    """Something went with its process or node that a run needs; built anew from the newest checkpoint, it loses and
    doubles nothing."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished request: where its rollouts lie, and what they are like."""

    request: RolloutRequest
    rollouts: ray.ObjectRef
    summary: RolloutSummary
    attempt: int = 0
    """How many times the request was handed out before."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A request in a worker's hands."""

    worker: int
    request: RolloutRequest
    rollouts: ray.ObjectRef
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A request that came to nothing in a worker's hands, and is queued again."""

    request: RolloutRequest
    attempt: int
    worker: int
    reason: str


def this_node() -> str:
    """Ray's name of the node this process runs on."""
    node: str = ray.get_runtime_context().get_node_id()
    return node


class RolloutPool:
    """Requests in, answers out, over an RLlib ``EnvRunnerGroup``.

    A lost worker's requests go back to their place in the queue; RLlib restarts the worker. An exception inside a
    worker is a bug or a user's error and is raised here as it is. Rollouts are return values of the workers' calls, so
    this process owns them: they outlive the worker that made them (what a worker itself puts into the object store dies
    with it). A lost node takes them along: ``take`` fetches those that do not lie on ``node``, the driver's, and asks
    anew for what is gone.
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
        self.workers, self.restore = group._worker_manager, group.probe_unhealthy_env_runners
        self.stamp, self.timeout, self.in_flight, self.node = stamp, timeout, in_flight, node
        self.health = health or Health(Cluster())
        self.say: Say = lambda text, kind="", **facts: None
        self.waiting: deque[RolloutRequest] = deque()
        self.running: dict[ray.ObjectRef, Running] = {}
        """By the reference to the call's (summary, metrics), in the order of sending."""
        self.answers: dict[int, Answer] = {}
        self.losses: dict[int, int] = {}
        self.lost: list[Loss] = []
        """What came to nothing; whoever keeps the books takes it from here."""
        self._handed: Counter[int] = Counter()
        self.metrics: list[dict[str, Any]] = []
        self._ticked = time.monotonic()
        self._heard: dict[int, float] = {}
        """When each worker last answered, or was asked while it had nothing to do."""
        self._stuck_since: float | None = None
        """Since when there is work and nobody to do it."""
        self._loads: Counter[int] = Counter()
        self._busy_seconds = 0.0

    def submit(self, requests: Iterable[RolloutRequest]) -> None:
        """Queue requests; they start as workers are free."""
        self.waiting.extend(requests)
        self._dispatch()

    def take(self, request_ids: Iterable[int]) -> list[Answer]:
        """Wait for these requests and return their answers in the given order; raises what ``take_when`` raises."""
        wanted = list(request_ids)
        return self.take_when(lambda: wanted if all(i in self.answers for i in wanted) else None)

    def take_when(self, choose: Callable[[], list[int] | None]) -> list[Answer]:
        """Poll until ``choose`` names finished requests, and return their answers in its order.

        Raises:
            TimeoutError: no worker came back in time.
            RunError: a request was lost with its worker too often, or workers die too often
                (``pipeline.rl.worker_health``).
            Stopped: the run was asked to end.
        """
        while True:
            while (chosen := choose()) is None:
                interrupts.check()  # here nothing is half done; in ``poll`` a learner may be at work
                self.poll(0.1)
            lost = [i for i in chosen if self._is_lost(self.answers[i])]
            if not lost:
                for i in chosen:
                    del self._handed[i]
                return [self.answers.pop(i) for i in chosen]
            gone = [self.answers.pop(i) for i in lost]
            self.lost += [
                Loss(
                    request=a.request,
                    attempt=a.attempt,
                    worker=a.summary.worker,
                    reason="its rollouts went with their node",
                )
                for a in gone
            ]
            self._requeue([a.request for a in gone])

    def release(self, worker: int) -> Any:
        """Take a worker out of the group, and what it has in its hands back into the queue; returns its handle."""
        self._requeue(self._take_back(worker, "its worker was stopped"))
        self._loads.pop(worker, None)
        self.health.forget(worker)
        return self.workers.remove_actor(worker)

    def stamps(self) -> dict[int, int | None]:
        """Every open request's policy version, ``None`` while it waits for a worker."""
        handed_out = [call.request for call in self.running.values()] + [
            answer.request for answer in self.answers.values()
        ]
        waiting: dict[int, int | None] = {request.request_id: None for request in self.waiting}
        return waiting | {request.request_id: request.policy.version for request in handed_out if request.policy}

    def busy_seconds(self) -> float:
        """Seconds since the last call that workers had work in their hands, summed over the workers."""
        self._tick()
        seconds, self._busy_seconds = self._busy_seconds, 0.0
        return seconds

    def forget(self) -> None:
        """Drop all requests and answers; what a worker is at is finished and thrown away."""
        self.waiting.clear()
        self.running.clear()
        self.answers.clear()
        self.losses.clear()
        self.lost.clear()
        self._handed.clear()
        self._loads.clear()

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
        self._recycle()
        self.restore()  # asks the workers that are down only
        self._dispatch()
        self._check_stuck()

    def _restart_silent(self) -> None:
        """A worker that has not answered in time is killed, and counts as one that died."""
        now = time.monotonic()
        for worker in [one for one, load in self._loads.items() if load and now - self._heard[one] > self.timeout]:
            requests = [call.request.request_id for call in self.running.values() if call.worker == worker]
            ray.kill(self.workers.actors()[worker], no_restart=False)
            why = (
                f"it has not answered for {self.timeout:g} s, with requests {requests} in its hands; raise "
                "cluster.worker_timeout_seconds"
            )
            self._lose(worker, TimeoutError(f"{why} if that is not long enough"))

    def _check_stuck(self) -> None:
        if self.running or not self.waiting:
            self._stuck_since = None
            return
        now = time.monotonic()
        self._stuck_since = now if self._stuck_since is None else self._stuck_since
        most = max(self.timeout, COMING_BACK)
        if now - self._stuck_since > most:
            down = sorted(set(self.workers.actor_ids()) - set(self.workers.healthy_actor_ids()))
            queued = [request.request_id for request in self.waiting]
            raise TimeoutError(
                f"no rollout worker has been there for {most:g} s; queued {queued}, down are workers {down}: "
                "raise cluster.worker_timeout_seconds, or look into these actors' logs"
            )

    def _dispatch(self) -> None:
        """Everybody gets one request before anybody gets two."""
        if not self.waiting:
            return
        healthy = [worker for worker in self.workers.healthy_actor_ids() if self.health.may_work(worker)]
        for depth in range(self.in_flight):
            for worker in healthy:
                if self.waiting and self._loads[worker] <= depth:
                    self._send(worker, self.stamp(self.waiting.popleft()))

    def _send(self, worker: int, request: RolloutRequest) -> None:
        call = self.workers.actors()[worker].apply.options(num_returns=2)
        rollouts, report = call.remote(methodcaller("sample_request", request))
        attempt = self._handed[request.request_id]
        self._handed[request.request_id] += 1
        self.running[report] = Running(worker=worker, request=request, rollouts=rollouts, attempt=attempt)
        self._tick()
        if not self._loads[worker]:
            self._heard[worker] = time.monotonic()
        self._loads[worker] += 1

    def _received(self, report: ray.ObjectRef) -> None:
        """A call is over."""
        self._tick()
        worker = self.running.pop(report).worker
        self._loads[worker] -= 1
        self._heard[worker] = time.monotonic()

    def _tick(self) -> None:
        """Count the time since the last change of anyone's load."""
        now = time.monotonic()
        self._busy_seconds += (now - self._ticked) * sum(load > 0 for load in self._loads.values())
        self._ticked = now

    def _collect(self, ready: list[ray.ObjectRef]) -> None:
        for report in ready:
            call = self.running.get(report)
            if call is None:
                continue  # lost with its worker a moment ago
            try:
                summary, metrics = ray.get(report)
            except RayActorError as error:
                self._lose(call.worker, error)
                continue
            self._received(report)
            self.losses.pop(call.request.request_id, None)
            self.health.answered(call.worker, summary.gib)
            self.answers[call.request.request_id] = Answer(
                request=call.request, rollouts=call.rollouts, summary=summary, attempt=call.attempt
            )
            self.metrics.append(metrics)

    def _lose(self, worker: int, error: Exception) -> None:
        """All that lay in a dead worker's hands is queued again; the first request is the one it was working on."""
        self.workers.set_actor_state(worker, healthy=False)
        requests = self._take_back(worker, f"its worker was lost: {first_line(error)}")
        blamed = requests[0]
        self.losses[blamed.request_id] = self.losses.get(blamed.request_id, 0) + 1
        if self.losses[blamed.request_id] >= MOST_LOSSES:
            raise RunError(
                f"request {blamed.request_id} (prompts {blamed.prompt_indices}) was lost with its worker "
                f"{MOST_LOSSES} times; "
                f"last: {first_line(error)}"
            ) from error
        self._requeue(requests)
        self._bury(worker, first_line(error))

    def _bury(self, worker: int, reason: str) -> None:
        """Note a death, and let go of a worker that dies again and again."""
        hopeless = self.health.died(worker)
        row = self.health.in_a_row[worker]
        self.say(f"worker {worker} was lost ({reason}), {row} in a row", "worker_lost", worker=worker, row=row)
        if not hopeless:
            return
        ray.kill(self.release(worker))
        left, fewest = len(self.workers.actor_ids()), self.health.limits.min_workers
        self.say(
            f"worker {worker} is let go after {row} deaths in a row; {left} are left",
            "worker_let_go",
            worker=worker,
            left=left,
        )
        if left < fewest:
            raise RunError(
                f"{left} rollout workers are left, fewer than cluster.min_workers={fewest}; the last died "
                f"{row} times: {reason}"
            )

    def _recycle(self) -> None:
        """Restart those that hold too much memory, once they have nothing in their hands; that is no death."""
        for worker in [one for one in sorted(self.health.leaving) if not self._loads[one]]:
            gib, limit = self.health.memory[worker], self.health.limits.worker_memory_gib
            text = (
                f"worker {worker} holds {gib:.1f} GiB, more than cluster.worker_memory_gib={limit:g}: it is restarted"
            )
            self.say(text, "worker_recycled", worker=worker, gib=round(gib, 2))
            ray.kill(self.workers.actors()[worker], no_restart=False)
            self.workers.set_actor_state(worker, healthy=False)
            self.health.leaving.discard(worker)

    def _take_back(self, worker: int, why: str) -> list[RolloutRequest]:
        """What is in a worker's hands, first come first."""
        reports = [report for report, call in self.running.items() if call.worker == worker]
        calls = [self.running[report] for report in reports]
        self.lost += [Loss(request=call.request, attempt=call.attempt, worker=worker, reason=why) for call in calls]
        for report in reports:
            self._received(report)
        return [call.request for call in calls]

    def _requeue(self, requests: Iterable[RolloutRequest]) -> None:
        """Put requests back to their place in the queue."""
        self.waiting = deque(sorted([*requests, *self.waiting], key=lambda request: request.request_id))

    def _is_lost(self, answer: Answer) -> bool:
        """Whether the rollouts went with their node; fetching them to this one also keeps them, whatever happens from
        now on."""
        if self.node in ("", answer.summary.node):
            return False
        try:
            ray.get(answer.rollouts)
        except ObjectLostError:
            return True
        return False
