"""Where the batch of an update comes from: sampled now, sampled ahead, or recorded. One verb, ``next_batch``."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from configs.schema import Improve, RunConfig
from latent_control.algorithms import ALGORITHMS
from latent_control.distributions import rollout_seed
from pipeline.rl import staleness
from pipeline.rl.accounting import Accounting
from pipeline.rl.curriculum import Curriculum
from pipeline.rl.prompt_order import chunk_count, chunks, equal_chunk_count, prompt_at
from pipeline.rl.published_policies import PublishedPolicies
from pipeline.rl.rollout_metrics import action_ages
from pipeline.rl.rollout_pool import FinishedRequest, RolloutPool
from rollout_workers.rollouts import RolloutRequest

SERVE_EVERY = 0.01
"""Seconds between two looks at the workers while the learner works."""


@dataclass(frozen=True, kw_only=True)
class RequestMaker:
    """Makes the requests for positions of the run's stream of prompts."""

    config: RunConfig
    prompt_count: int
    """Training prompts of the task."""
    ships_features: bool
    latent: bool
    """Whether the policy chooses codes (level "latent")."""
    published: PublishedPolicies

    @property
    def improve(self) -> Improve:
        """The config's section about RL."""
        assert self.config.improve is not None
        return self.config.improve

    def prompt_of(self, position: int) -> int:
        """The prompt at a position."""
        count = self.improve.prompts_per_update
        return prompt_at(position, count, size=self.prompt_count, seed=self.config.seed)[1]

    def __call__(self, positions: Sequence[int]) -> RolloutRequest:
        run, improve = self.config, self.improve
        places = [prompt_at(p, improve.prompts_per_update, size=self.prompt_count, seed=run.seed) for p in positions]
        return RolloutRequest(
            request_id=positions[0],
            split="train",
            prompt_indices=tuple(index for _, index in places),
            seeds=tuple(rollout_seed(run.seed, update) >> 1 for update, _ in places),
            group_size=improve.group_size,
            policy=self.published.current,
            temperature=run.rollout.temperature,
            top_k=run.rollout.top_k,
            ship_features=self.ships_features,
            aliases=improve.equivalent_codes if self.latent else None,
            greedy_baseline=ALGORITHMS[improve.algorithm].greedy,
            board=self.published.board,
        )


class RequestStream(ABC):
    """What each update trains on, and which prompts come next."""

    def __init__(self, make: RequestMaker, pool: RolloutPool, accounting: Accounting) -> None:
        self.make, self.pool, self.accounting = make, pool, accounting
        self.improve, self.published = make.improve, make.published
        self.next_position = 0
        """The first position of the stream of prompts that nobody has asked for."""
        self.metrics: dict[str, float] = {}
        """What the last ``next_batch`` measured."""
        self.curriculum = Curriculum(self.improve.curriculum, make.config.seed)

    @abstractmethod
    def next_batch(self) -> list[FinishedRequest]:
        """Wait for what the next update trains on; raises what ``RolloutPool.take_when`` raises."""

    def serving(self) -> AbstractContextManager[None]:
        """A block in which the learner works; meanwhile workers get what this stream has for them."""
        return nullcontext()

    def request(self, positions: Sequence[int]) -> RolloutRequest:
        """The request for the prompts at these positions, which are open from now on."""
        self.accounting.open[positions[0]] = tuple(positions)
        return self.make(positions)

    def unfinished(self) -> list[int]:
        """Positions asked for, or to be asked for next, and not trained on."""
        return sorted(chain(*self.accounting.open.values()))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's ``unasked`` and ``next_position``; what is in flight is forgotten."""
        self.pool.forget()
        self.accounting.open.clear()
        self.next_position = state["next_position"]


class SyncStream(RequestStream):
    """Samples a batch with the current policy while the learner waits."""

    def __init__(self, make: RequestMaker, pool: RolloutPool, accounting: Accounting) -> None:
        super().__init__(make, pool, accounting)
        self._cursor = 0
        """The next position to look at; it becomes ``next_position`` when the batch is whole, so that an update that
        was interrupted is sampled again."""
        self._passed: dict[int, int] = {}
        """Positions of the batch that the curriculum passed over, and their prompts."""

    def next_batch(self) -> list[FinishedRequest]:
        """Sample the whole batch now; groups of equal rewards give way to fresh ones as far as
        ``improve.dynamic_sampling`` allows."""
        started, wanted = time.perf_counter(), self.improve.prompts_per_update
        self._cursor, self._passed = max(self.next_position, self.published.current.version * wanted), {}
        batch = self._sampled(wanted)
        room = int(self.improve.dynamic_sampling * wanted)
        while extra := min(room, wanted - sum(not tied for one in batch for tied in one.equal_rewards)):
            room -= extra
            batch += self._sampled(extra)
        self.next_position = self._cursor
        self.metrics = {"seconds_sampling": time.perf_counter() - started}
        if self.improve.dynamic_sampling:
            self.metrics["extra_groups"] = sum(len(one.equal_rewards) for one in batch) - wanted
        if self.improve.curriculum < 1:
            self.metrics["prompts_passed"] = len(self._passed)
            self.accounting.passed(self._passed)
        return left_out(batch, wanted)

    def _sampled(self, count: int) -> list[FinishedRequest]:
        """The groups of the next ``count`` prompts."""
        requests = self.requests_for(self._next_positions(count))
        self.pool.submit(requests)
        found = self.pool.take(request.request_id for request in requests)
        if self.improve.curriculum < 1:
            self.curriculum.learn([row for one in found for row in self.accounting.entries(one, "trained")])
        return found

    def requests_for(self, positions: Sequence[int]) -> list[RolloutRequest]:
        """Positions in nearly equal requests, one at least for each worker there may be."""
        run = self.make.config
        parts = chunk_count(len(positions), self.pool.most_workers(run), run.cluster.num_learners)
        return [self.request(part) for part in chunks(positions, parts)]

    def _next_positions(self, count: int) -> list[int]:
        """The next ``count`` positions whose prompts the curriculum asks for."""
        found = list[int]()
        while len(found) < count:
            prompt = self.make.prompt_of(self._cursor)
            if self.curriculum.asks(self._cursor, prompt):
                found.append(self._cursor)
            else:
                self._passed[self._cursor] = prompt
            self._cursor += 1
        return found


def left_out(batch: Sequence[FinishedRequest], wanted: int) -> list[FinishedRequest]:
    """``batch`` without groups of equal rewards, the last sampled first, until ``wanted`` groups are left."""
    groups = [(number, group) for number, one in enumerate(batch) for group in range(len(one.equal_rewards))]
    tied = [(number, group) for number, group in groups if batch[number].equal_rewards[group]]
    out = set(tied[len(tied) - (len(groups) - wanted) :]) if len(groups) > wanted else set()
    return [
        replace(one, left_out=frozenset(group for at, group in out if at == number)) if out else one
        for number, one in enumerate(batch)
    ]


class AsyncStream(RequestStream):
    """Asks ahead as far as the staleness allows, and takes whatever is finished and may be taken
    (``pipeline.rl.staleness``)."""

    def __init__(self, make: RequestMaker, pool: RolloutPool, accounting: Accounting) -> None:
        super().__init__(make, pool, accounting)
        run = make.config
        self.per_update = equal_chunk_count(self.improve.prompts_per_update, run.most_workers, run.cluster.num_learners)
        """Requests per update, all of one size."""
        self.unasked: deque[int] = deque()
        """Positions to be asked for before ``next_position``."""
        self.dropped = 0

    def next_batch(self) -> list[FinishedRequest]:
        """Wait for enough requests that may be trained on now."""
        self._ask_ahead()
        started, self.dropped = time.perf_counter(), 0
        batch = self.pool.take_when(self._choose)
        self.metrics = {
            "seconds_waiting": time.perf_counter() - started,
            "requests_ready": len(self.pool.finished),
            "stale_dropped": self.dropped,
        }
        ages = action_ages(batch, self.published.current.version)
        for age in range(max(self.improve.max_staleness, *ages) + 1):
            self.metrics[f"staleness_{age}"] = ages[age] / ages.total()
        return batch

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A block during which a thread hands the workers what they ask for; what that raises is raised at its end."""
        done = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            served = thread.submit(self._serve, done)
            try:
                yield
            finally:
                done.set()
        served.result()

    def _serve(self, done: threading.Event) -> None:
        while not done.wait(SERVE_EVERY):
            self.pool.poll()

    def unfinished(self) -> list[int]:
        """Positions asked for, or to be asked for next, and not trained on."""
        return sorted([*self.unasked, *super().unfinished()])

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue; prompts that were in flight come first, so that none is lost or doubled."""
        super().restore(state)
        self.unasked = deque(state["unasked"])

    def _ask_ahead(self) -> None:
        """Open as many requests as the staleness has room for."""
        size = self.improve.prompts_per_update // self.per_update
        room = staleness.room(self.pool.stamps(), per_update=self.per_update, max_staleness=self.improve.max_staleness)
        for _ in range(room):
            while len(self.unasked) < size:
                self.unasked.append(self.next_position)
                self.next_position += 1
            self.pool.submit([self.request([self.unasked.popleft() for _ in range(size)])])

    def _choose(self) -> list[int] | None:
        """The requests that the next update trains on; ``None``: wait."""
        if self.improve.stale == "drop":
            self._drop_stale()
        return staleness.next_batch(
            self.pool.stamps(),
            self.pool.finished,
            version=self.published.current.version,
            per_update=self.per_update,
            max_staleness=self.improve.max_staleness if self.improve.stale == "wait" else None,
        )

    def _drop_stale(self) -> None:
        """Throw away what is too stale by now and ask for it again."""
        expired = staleness.expired(
            self.pool.stamps(),
            self.pool.finished,
            version=self.published.current.version,
            max_staleness=self.improve.max_staleness,
        )
        dropped = [self.pool.finished.pop(i) for i in expired]
        self.dropped += len(dropped)
        why = "the policy had moved on too far"
        self.accounting.note([row for one in dropped for row in self.accounting.entries(one, "stale", why)])
        self.pool.submit([one.request for one in dropped])


class RecordedStream(RequestStream):
    """Repeats recorded batches in place of ``stream``, which still serves the workers
    (``pipeline.integrity.reproduce``)."""

    def __init__(self, stream: RequestStream, batches: Iterator[list[FinishedRequest]]) -> None:
        super().__init__(stream.make, stream.pool, stream.accounting)
        self.stream, self.batches = stream, batches

    def next_batch(self) -> list[FinishedRequest]:
        """The next recorded batch."""
        return next(self.batches)

    def serving(self) -> AbstractContextManager[None]:
        """As the stream it stands for."""
        return self.stream.serving()


STREAMS: dict[str, type[RequestStream]] = {"sync": SyncStream, "async": AsyncStream}
"""By ``improve.mode``."""
