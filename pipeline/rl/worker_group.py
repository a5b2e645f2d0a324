"""The rollout workers of a run, whose number may change while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from configs.schema import RunConfig
from pipeline.rl.autoscale import Demand, next_demand
from pipeline.rl.rllib_private import new_worker, resources_of
from pipeline.rl.rollout_pool import RolloutPool
from pipeline.runs.control import read_request
from pipeline.runs.events import Say

JOIN_PATIENCE = 60.0
"""Seconds after which a worker that has not started is worth a word."""


class WorkerGroup:
    """The workers of an RLlib ``EnvRunnerGroup`` and those on their way to it.

    A new worker joins the group once it is up, so nobody ever waits for one that finds no room; should room appear, it
    still comes.
    """

    def __init__(self, group: Any, pool: RolloutPool) -> None:
        self.group, self.pool = group, pool
        self.joining: dict[ray.ObjectRef, Any] = {}
        """Handles by the answer to their first call."""
        self.say: Say = lambda text, kind="", **facts: print(text)
        self.started: int = group.num_remote_env_runners()
        self.asked, self.complained = 0.0, True

    @property
    def up(self) -> list[int]:
        """Ids of the workers in the group, those that Ray is restarting included."""
        ids: list[int] = self.pool.workers.actor_ids()
        return ids

    @property
    def size(self) -> int:
        """Workers up or on their way."""
        return len(self.up) + len(self.joining)

    def report_to(self, say: Say) -> None:
        """Report changes of the group, and losses of its workers, to ``say``."""
        self.say = say
        self.pool.watch.report_to(say)

    def scale_to(self, workers: int) -> None:
        """Start or stop workers until ``workers`` are up or on their way; returns at once."""
        if workers == self.size:
            return
        self.say(f"rollout workers: {self.size} -> {workers}")
        while self.size < workers:
            self._start()
        while self.size > workers:
            self._stop_one()

    def admit(self) -> None:
        """Let those that are up join; say which cannot start, and, once, that some find no room."""
        if not self.joining:
            return
        for ref in ray.wait(list(self.joining), num_returns=len(self.joining), timeout=0)[0]:
            actor = self.joining.pop(ref)
            try:
                ray.get(ref)
            except RayActorError as error:
                if error.actor_init_failed:
                    self.say(f"a new rollout worker could not start, the run goes on with {len(self.up)}: {error}")
                else:  # its node was lost; Ray starts it again elsewhere
                    self.joining[actor.ping.remote()] = actor
            else:
                self.pool.workers.add_actors([actor])
        if self.joining and not self.complained and time.monotonic() - self.asked > JOIN_PATIENCE:
            self.complained = True
            waiting = f"{len(self.joining)} new rollout workers have not started yet"
            self.say(f"{waiting}, the run goes on with {len(self.up)}; {self._room()}")

    def stop(self) -> None:
        """Stop those that have not joined; the others are the group's."""
        for actor in self.joining.values():
            ray.kill(actor)
        self.joining.clear()

    def _start(self) -> None:
        self.started += 1
        actor = new_worker(self.group, self.started)
        self.joining[actor.ping.remote()] = actor
        self.asked, self.complained = time.monotonic(), False

    def _stop_one(self) -> None:
        """The one least missed: not there yet, else down, else the youngest."""
        if self.joining:
            ray.kill(self.joining.popitem()[1])
            return
        healthy = set(self.pool.workers.healthy_actor_ids())
        worker = max(self.up, key=lambda one: (one not in healthy, one))
        ray.kill(self.pool.release(worker))

    def _room(self) -> str:
        each, free = resources_of(self.group), ray.available_resources()
        left = f"free are {free.get('CPU', 0):g} and {free.get('GPU', 0):g}"
        return f"each needs {each['num_cpus']:g} CPUs and {each['num_gpus']:g} GPUs, {left}"


class Scaler:
    """Between two updates: brings the number of workers to what was asked for, or to what autoscaling thinks right."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        workers: WorkerGroup,
        say: Say,
        progressed: Callable[[], None] = lambda: None,
    ) -> None:
        """``progressed`` is called before each update."""
        self.settings, self.run_dir, self.workers, self.say = config.cluster.autoscale, run_dir, workers, say
        self.progressed = progressed
        self.demand = Demand(workers=config.rollout.num_workers)
        self.applied, self.problem = self.demand.workers, ""
        workers.report_to(say)

    def before_update(self) -> None:
        """Look at the control file, start and stop workers."""
        self.progressed()
        if (asked := self._asked()) is not None:
            self.demand = Demand(workers=asked)
        if self.demand.workers != self.applied:  # once: a worker that cannot start must not be started at every update
            self.applied = self.demand.workers
            self.workers.scale_to(self.applied)
        self.workers.admit()

    def after_update(self, metrics: Mapping[str, float]) -> None:
        """Take in how an update went; workers on their way may still change that."""
        if self.settings is not None and not self.workers.joining and self._asked() is None:
            self.demand = next_demand(self.demand, metrics["idle_learner"], metrics["idle_workers"], self.settings)

    def _asked(self) -> int | None:
        try:
            return read_request(self.run_dir)
        except ValueError as error:
            if str(error) != self.problem:
                self.problem = str(error)
                self.say(self.problem)
            return None


class Unscaled:
    """In the place of a ``Scaler`` where the workers are shared."""

    def __init__(self, pool: RolloutPool, say: Say) -> None:
        pool.watch.report_to(say)

    def before_update(self) -> None:
        """Nothing."""

    def after_update(self, metrics: Mapping[str, float]) -> None:
        """Nothing."""
