"""Which rollout workers may work: restarts are bounded, and wait longer each time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from configs.schema import Cluster
from pipeline.runs.errors import RunError

LONGEST_REST = 60.0


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
