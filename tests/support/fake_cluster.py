"""Rollout workers that finish in any order, die, fail and fall silent, without Ray."""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray.exceptions import ActorDiedError

from rollout_workers.rollouts import PolicyVersion, RolloutRequest, RolloutSummary


def request(number: int, policy: PolicyVersion | None = None) -> RolloutRequest:
    return RolloutRequest(
        request_id=number, split="train", prompt_indices=(number,), seeds=(0,), group_size=2, policy=policy
    )


class Ref:
    """Stands for an object reference; holds what getting it gives or raises."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: Exception | None = None
        self.ready = False


class FakeCluster:
    """Workers that take requests first in, first out, as an ``EnvRunnerGroup`` and as the ``ray`` module at once.

    Each ``wait`` lets chance decide: a worker finishes its first request, or dies with all it has.
    """

    def __init__(self, workers: int, *, seed: int = 0, death: float = 0.0) -> None:
        self.queues: dict[int, deque[tuple[tuple[Ref, ...], Ref, Any]]] = {i: deque() for i in range(1, workers + 1)}
        self.healthy = dict.fromkeys(self.queues, True)
        self.alive = dict.fromkeys(self.queues, True)
        self.chance, self.death = random.Random(seed), death
        self.sampled: Counter[int] = Counter()
        self.deaths = 0
        self.gib: defaultdict[int, float] = defaultdict(float)
        self.killed: list[int] = []
        self.act: Callable[[FakeCluster], None] = FakeCluster.by_chance

    # -- what the pool uses of the group ------------------------------------------------------------------------------

    @property
    def _worker_manager(self) -> FakeCluster:
        return self

    def actor_ids(self) -> list[int]:
        return list(self.queues)

    def healthy_actor_ids(self) -> list[int]:
        return [worker for worker, healthy in self.healthy.items() if healthy]

    def remove_actor(self, worker: int) -> Any:
        self.healthy.pop(worker)
        self.alive.pop(worker)
        self.queues.pop(worker)
        return SimpleNamespace(number=worker)

    def set_actor_state(self, worker: int, healthy: bool) -> None:
        self.healthy[worker] = healthy

    def actors(self) -> dict[int, Any]:
        return {worker: SimpleNamespace(apply=self.apply(worker), number=worker) for worker in self.queues}

    def apply(self, worker: int) -> Any:
        def options(*, num_returns: int) -> Any:
            def remote(function: Callable[[Any], Any]) -> tuple[Ref, ...]:
                refs = tuple(Ref() for _ in range(num_returns))
                self.queues[worker].append((refs[:-1], refs[-1], function))
                if not self.alive[worker]:
                    self.kill(worker)
                return refs

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(options=options)

    def probe_unhealthy_env_runners(self) -> None:
        """What RLlib does between polls: a worker that Ray has restarted answers a ping and is healthy again."""
        for worker in self.queues:
            if not self.alive[worker] and self.chance.random() < 0.5:
                self.alive[worker] = True
            self.healthy[worker] = self.healthy[worker] or self.alive[worker]

    # -- what the pool uses of ray ------------------------------------------------------------------------------------

    def wait(self, refs: list[Ref], *, num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        assert num_returns == len(refs) if timeout == 0 else num_returns == 1
        if timeout == 0:
            self.act(self)
        return [r for r in refs if r.ready], [r for r in refs if not r.ready]

    def get(self, ref: Ref) -> Any:
        if ref.error is not None:
            raise ref.error
        return ref.value

    # -- what happens -------------------------------------------------------------------------------------------------

    def by_chance(self) -> None:
        worker = self.chance.choice(list(self.queues))
        if self.chance.random() < self.death:
            self.kill(worker)
        elif self.queues[worker]:
            self.finish(worker)

    def kill(self, worker: Any, no_restart: bool = True) -> None:
        """As chance does it, by number; as ``ray.kill``, by handle."""
        if not isinstance(worker, int):
            worker = int(worker.number)
            self.killed.append(worker)
        if worker not in self.queues:
            return
        self.alive[worker], self.deaths = False, self.deaths + 1
        while self.queues[worker]:
            rollouts, report, _ = self.queues[worker].popleft()
            for ref in (*rollouts, report):
                ref.error, ref.ready = ActorDiedError(), True

    def finish(self, worker: int) -> None:
        rollouts, report, function = self.queues[worker].popleft()
        *values, report.value = function(
            SimpleNamespace(
                sample_request=lambda asked: self.answer(worker, asked),
                sample_requests=lambda several: self.answers(worker, several),
            )
        )
        for ref, value in zip(rollouts, values, strict=True):
            ref.value, ref.ready = value, True
        report.ready = True

    def fail(self, worker: int, error: Exception) -> None:
        _, report, _ = self.queues[worker].popleft()
        report.error, report.ready = error, True

    def answer(self, worker: int, asked: RolloutRequest) -> Any:
        self.sampled[asked.request_id] += 1
        version = asked.policy.version if asked.policy else 0
        pairs = len(asked.prompt_indices) * asked.group_size // 2
        summary = RolloutSummary(
            request_id=asked.request_id,
            worker=worker,
            policies=((version, asked.policy.weights_hash if asked.policy else "", 2),),
            rollouts=2,
            tokens=2,
            failures=0,
            rewards=(0.0, 1.0) * pairs,
            successes=(False, True) * pairs,
            seconds=0.0,
            gib=self.gib[worker],
        )
        return [f"rollout {asked.request_id}"], (summary, {"worker": worker})

    def answers(self, worker: int, several: tuple[RolloutRequest, ...]) -> tuple[Any, ...]:
        """Of a worker of many policies."""
        found = [self.answer(worker, asked) for asked in several]
        return *(rollouts for rollouts, _ in found), [report for _, report in found]
