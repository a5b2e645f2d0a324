"""Which rollout workers may work: restarts are bounded, and wait longer each time; silent and too large workers are
restarted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import ray

from configs.schema import Cluster
from pipeline.runs.errors import RunError
from pipeline.runs.events import Say

LONGEST_REST = 60.0
COMING_BACK = 300.0
"""Seconds that workers which are all down at once have at least to come back: a restart loads the base LM again."""


class Health:
    """Keeps count of deaths. A worker is *working*; *resting* for a while after a death (the first one rests none);
    *leaving* once it has taken too much memory, until its hands are empty; or *let go* after too many deaths without an
    answer between.

    The clock is monotonic, in seconds.
    """

    def __init__(self, limits: Cluster, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._clock = limits, clock
        self.in_a_row: Counter[int] = Counter()
        self.deaths = 0
        """Of all workers since the start."""
        self.leaving: set[int] = set()
        self.memory: dict[int, float] = {}
        """GiB each worker held when it last answered."""
        self._rests_until: dict[int, float] = {}

    def died(self, worker: int) -> bool:
        """Take note of a death; whether the worker is to be let go.

        Raises:
            RunError: that was one death too many for the whole run.
        """
        self.deaths += 1
        self.in_a_row[worker] += 1
        row = self.in_a_row[worker]
        rest = 0.0 if row == 1 else min(LONGEST_REST, self.limits.restart_seconds * 2 ** (row - 2))
        self._rests_until[worker] = self._clock() + rest
        self.leaving.discard(worker)
        if self.deaths > self.limits.max_worker_deaths:
            raise RunError(
                f"rollout workers died {self.deaths} times, more than "
                f"cluster.max_worker_deaths={self.limits.max_worker_deaths}: "
                "look at the reasons in the run's events.jsonl (latent-control diagnose RUN), or raise it"
            )
        return row > self.limits.max_restarts_in_a_row

    def answered(self, worker: int, gib: float) -> None:
        """Take note of an answer, and of the memory its worker holds."""
        self.in_a_row.pop(worker, None)
        self.memory[worker] = gib
        if self.limits.worker_memory_gib is not None and gib > self.limits.worker_memory_gib:
            self.leaving.add(worker)

    def may_work(self, worker: int) -> bool:
        """Neither resting nor leaving."""
        return worker not in self.leaving and self._clock() >= self._rests_until.get(worker, 0.0)

    def forget(self, worker: int) -> None:
        """It is gone for good."""
        for book in (self.in_a_row, self._rests_until, self.memory):
            book.pop(worker, None)
        self.leaving.discard(worker)


class WorkerWatch:
    """Counts what the workers of an RLlib ``EnvRunnerGroup`` have in their hands, and ends those that are silent, hold
    too much memory or die again and again.

    The times are monotonic, in seconds.
    """

    def __init__(self, workers: Any, *, timeout: float, health: Health) -> None:
        self.workers, self.timeout, self.health = workers, timeout, health
        self.say: Say = lambda text, kind="", **facts: None
        self.loads: Counter[int] = Counter()
        """Requests in each worker's hands."""
        self._heard: dict[int, float] = {}
        """When each worker last answered, or was asked while it had nothing to do."""
        self._stuck_since: float | None = None
        """Since when there is work and nobody to do it."""
        self._busy_seconds, self._busy_told, self._ticked = 0.0, 0.0, time.monotonic()

    def report_to(self, say: Say) -> None:
        """Tell ``say`` of every loss and restart."""
        self.say = say

    def sent(self, worker: int) -> None:
        """Note a request more in a worker's hands."""
        self._tick()
        if not self.loads[worker]:
            self._heard[worker] = time.monotonic()
        self.loads[worker] += 1

    def received(self, worker: int) -> None:
        """Note a request fewer in a worker's hands."""
        self._tick()
        self.loads[worker] -= 1
        self._heard[worker] = time.monotonic()

    def busy_seconds(self) -> float:
        """Seconds since the last call that workers had work in their hands, summed over the workers."""
        self._tick()
        seconds, self._busy_told = self._busy_seconds - self._busy_told, self._busy_seconds
        return seconds

    def busy_in_all(self) -> float:
        """The same since the start."""
        self._tick()
        return self._busy_seconds

    def _tick(self) -> None:
        """Count the time since the last change of any load."""
        now = time.monotonic()
        self._busy_seconds += (now - self._ticked) * sum(load > 0 for load in self.loads.values())
        self._ticked = now

    def able(self) -> list[int]:
        """Workers that are up, and neither resting nor leaving."""
        return [worker for worker in self.workers.healthy_actor_ids() if self.health.may_work(worker)]

    def silent(self) -> list[int]:
        """Workers that have not answered in time."""
        now = time.monotonic()
        return [one for one, load in self.loads.items() if load and now - self._heard[one] > self.timeout]

    def end_silent(self, worker: int, requests: Sequence[int]) -> TimeoutError:
        """Restart a silent worker with these requests in its hands; returns why."""
        self.restart(worker)
        return TimeoutError(
            f"it has not answered for {self.timeout:g} s, with requests {requests} in its hands; raise "
            "cluster.worker_timeout_seconds if that is not long enough"
        )

    def restart(self, worker: int) -> None:
        """Kill a worker; RLlib starts it again."""
        ray.kill(self.workers.actors()[worker], no_restart=False)

    def remove(self, worker: int) -> Any:
        """Take a worker out of the group; returns its handle."""
        self.loads.pop(worker, None)
        self.health.forget(worker)
        return self.workers.remove_actor(worker)

    def died(self, worker: int, reason: str) -> None:
        """Note a death, and let go of a worker that dies again and again.

        Raises:
            RunError: too many died, or fewer than ``cluster.min_workers`` are left.
        """
        hopeless = self.health.died(worker)
        row = self.health.in_a_row[worker]
        self.say(f"worker {worker} was lost ({reason}), {row} in a row", "worker_lost", worker=worker, row=row)
        if not hopeless:
            return
        ray.kill(self.remove(worker))
        left, fewest = len(self.workers.actor_ids()), self.health.limits.min_workers
        text = f"worker {worker} is let go after {row} deaths in a row; {left} are left"
        self.say(text, "worker_let_go", worker=worker, left=left)
        if left < fewest:
            raise RunError(
                f"{left} rollout workers are left, fewer than cluster.min_workers={fewest}; the last died "
                f"{row} times: {reason}"
            )

    def recycle(self) -> None:
        """Restart those that hold too much memory, once they have nothing in their hands; that is no death."""
        for worker in [one for one in sorted(self.health.leaving) if not self.loads[one]]:
            gib, limit = self.health.memory[worker], self.health.limits.worker_memory_gib
            text = (
                f"worker {worker} holds {gib:.1f} GiB, more than cluster.worker_memory_gib={limit:g}: it is restarted"
            )
            self.say(text, "worker_recycled", worker=worker, gib=round(gib, 2))
            self.restart(worker)
            self.workers.set_actor_state(worker, healthy=False)
            self.health.leaving.discard(worker)

    def check_stuck(self, queued: Sequence[int]) -> None:
        """Look for work that nobody does; ``queued`` are the requests that wait while none is being worked on.

        Raises:
            TimeoutError: no worker came back in time.
        """
        if not queued:
            self._stuck_since = None
            return
        now = time.monotonic()
        self._stuck_since = now if self._stuck_since is None else self._stuck_since
        most = max(self.timeout, COMING_BACK)
        if now - self._stuck_since > most:
            down = sorted(set(self.workers.actor_ids()) - set(self.workers.healthy_actor_ids()))
            raise TimeoutError(
                f"no rollout worker has been there for {most:g} s; queued {queued}, down are workers {down}: "
                "raise cluster.worker_timeout_seconds, or look into these actors' logs"
            )
