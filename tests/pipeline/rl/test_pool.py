"""The rollout pool against workers that finish in any order, die, fail and fall silent; the asynchronous window over
it."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError

from configs.schema import Cluster, Improve, RunConfig
from latent_control.distributions import rollout_seed
from pipeline.rl import rollout_pool, worker_health
from pipeline.rl.accounting import Accounting
from pipeline.rl.guards import check_hashes
from pipeline.rl.prompt_order import prompt_indices
from pipeline.rl.published_policies import PublishedPolicies
from pipeline.rl.request_stream import STREAMS, RequestMaker
from pipeline.rl.rollout_metrics import rollout_metrics
from pipeline.rl.rollout_pool import FinishedRequest, RolloutPool
from pipeline.rl.worker_health import Health
from pipeline.runs.errors import RunError
from rollout_workers.rollouts import PolicyVersion, RolloutRequest, RolloutSummary

# A pool that loses a request waits for ever.
pytestmark = pytest.mark.timeout(60)


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
        self.queues: dict[int, deque[tuple[Ref, Ref, Any]]] = {i: deque() for i in range(1, workers + 1)}
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
        def remote(function: Callable[[Any], Any]) -> tuple[Ref, Ref]:
            refs = Ref(), Ref()
            self.queues[worker].append((*refs, function))
            if not self.alive[worker]:
                self.kill(worker)
            return refs

        def options(*, num_returns: int) -> Any:
            assert num_returns == 2
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
            for ref in self.queues[worker].popleft()[:2]:
                ref.error, ref.ready = ActorDiedError(), True

    def finish(self, worker: int) -> None:
        rollouts, report, function = self.queues[worker].popleft()
        rollouts.value, report.value = function(
            SimpleNamespace(sample_request=lambda asked: self.answer(worker, asked))
        )
        rollouts.ready = report.ready = True

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


@pytest.fixture
def make_pool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RolloutPool, FakeCluster]]:
    def make(workers: int = 2, *, timeout: float = 60.0, **settings: Any) -> tuple[RolloutPool, FakeCluster]:
        cluster = FakeCluster(workers, **settings)
        monkeypatch.setattr(rollout_pool, "ray", cluster)
        monkeypatch.setattr(worker_health, "ray", cluster)
        return RolloutPool(cluster, timeout=timeout), cluster

    return make


def set_clock(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace, sleep: Callable[[float], None] = lambda _: None
) -> None:
    """Let pool and workers' watch read ``clock.now``."""
    fake = SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep)
    for module in (rollout_pool, worker_health):
        monkeypatch.setattr(module, "time", fake)


Make = Callable[..., tuple[RolloutPool, FakeCluster]]


def check(answers: list[FinishedRequest], numbers: list[int]) -> None:
    assert [a.summary.request_id for a in answers] == numbers == [a.request.request_id for a in answers]
    assert [a.rollouts.value for a in answers] == [[f"rollout {n}"] for n in numbers]


@pytest.mark.parametrize("seed", range(5))
def test_answers_come_in_the_order_asked_for_whoever_finishes_first(make_pool: Make, seed: int) -> None:
    pool, cluster = make_pool(3, seed=seed)
    pool.submit(map(request, range(10)))
    first, rest = pool.take([7, 2, 9]), pool.take([0, 1, 3, 4, 5, 6, 8])
    check(first, [7, 2, 9])
    check(rest, [0, 1, 3, 4, 5, 6, 8])
    assert set(cluster.sampled.values()) == {1} and not pool.finished and not pool.running
    assert [a.metrics for a in first + rest] == [{"worker": a.summary.worker} for a in first + rest]


def test_a_worker_holds_two_requests_at_most_and_each_gets_one_first(make_pool: Make) -> None:
    pool, cluster = make_pool(3)
    pool.submit(map(request, range(4)))
    assert [len(queue) for queue in cluster.queues.values()] == [2, 1, 1]
    pool.submit(map(request, range(4, 20)))
    assert [len(queue) for queue in cluster.queues.values()] == [2, 2, 2] and len(pool.waiting) == 14


@pytest.mark.parametrize("seed", range(20))
def test_lost_workers_cost_nothing(make_pool: Make, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_pool, "MOST_LOSSES", 100)
    pool, cluster = make_pool(3, seed=seed, death=0.3)
    pool.submit(map(request, range(12)))
    check(pool.take(range(12)), list(range(12)))
    assert cluster.deaths > 0
    assert not pool.running and not pool.waiting and not pool.finished and not pool.losses


def test_requests_of_a_lost_worker_go_to_the_head_of_the_queue_in_their_order(make_pool: Make) -> None:
    pool, cluster = make_pool(1)
    pool.submit(map(request, range(5)))
    cluster.act, pool.restore = (lambda c: c.kill(1)), (lambda: None)
    pool.poll()
    assert [r.request_id for r in pool.waiting] == [0, 1, 2, 3, 4]
    assert pool.losses == {0: 1}, "only the request that was being worked on is to blame"
    assert cluster.healthy_actor_ids() == []


def test_requests_of_a_removed_worker_go_back_to_their_place(make_pool: Make) -> None:
    pool, cluster = make_pool(2)
    pool.submit(map(request, range(6)))  # worker 1 has 0 and 2, worker 2 has 1 and 3
    assert pool.release(1).number == 1
    assert [r.request_id for r in pool.waiting] == [0, 2, 4, 5] and not pool.losses, "it is nobody's fault"
    check(pool.take(range(6)), list(range(6)))
    assert set(cluster.sampled.values()) == {1} and not pool.running and set(pool.watch.loads) == {2}


def test_rollouts_lost_with_their_node_are_sampled_again(make_pool: Make) -> None:
    """Worker 1 has answered and is idle when its node goes: nobody hears of that before the rollouts are fetched."""
    pool, cluster = make_pool(2)
    honest, nodes = cluster.answer, {1: "away", 2: "here"}

    def answer(worker: int, asked: RolloutRequest) -> Any:
        rollouts, (summary, metrics) = honest(worker, asked)
        return rollouts, (replace(summary, node=nodes[worker]), metrics)

    cluster.answer, pool.node = answer, "here"  # type: ignore[method-assign]
    pool.submit(map(request, range(4)))
    while len(pool.finished) < 4:
        pool.poll()
    gone = {i for i, found in pool.finished.items() if found.summary.worker == 1}
    for i in gone:
        pool.finished[i].rollouts.error = ObjectLostError("00", "", "")
    nodes[1] = "here"
    check(pool.take(range(4)), [0, 1, 2, 3])
    assert gone and cluster.sampled == {i: 2 if i in gone else 1 for i in range(4)}


def test_an_answer_that_arrived_before_its_worker_died_counts(make_pool: Make) -> None:
    pool, cluster = make_pool(1)
    pool.submit(map(request, range(2)))

    def finish_then_die(c: FakeCluster) -> None:
        c.finish(1)
        c.kill(1)
        c.act = FakeCluster.by_chance

    cluster.act = finish_then_die
    check(pool.take([0, 1]), [0, 1])
    assert cluster.sampled == {0: 1, 1: 1}


def test_an_exception_in_a_worker_comes_out_as_itself(make_pool: Make) -> None:
    pool, cluster = make_pool(2)
    pool.submit(map(request, range(4)))
    cluster.act = lambda c: c.fail(2, ValueError("prompt 1 has 600 tokens"))
    with pytest.raises(ValueError, match="prompt 1 has 600 tokens"):
        pool.take(range(4))


def test_a_request_that_keeps_killing_workers_is_named(make_pool: Make) -> None:
    pool, cluster = make_pool(2)

    def poison(c: FakeCluster) -> None:
        for worker, queue in c.queues.items():
            if queue:
                first = queue[0][2](SimpleNamespace(sample_request=lambda asked: asked.request_id))
                c.kill(worker) if first == 3 else c.finish(worker)

    cluster.act = poison
    pool.submit(map(request, range(6)))
    with pytest.raises(
        RuntimeError, match=r"request 3 \(prompts \(3,\)\) was lost with its worker 3 times; last: .*died"
    ):
        pool.take(range(6))
    assert cluster.deaths == 3


def test_a_silent_worker_is_restarted_and_its_requests_are_handed_out_again(
    make_pool: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, cluster = make_pool(2, timeout=5.0)
    clock = SimpleNamespace(now=0.0)
    set_clock(monkeypatch, clock)
    said: list[tuple[str, str]] = []
    pool.watch.say = lambda text, kind="", **facts: said.append((kind, text))
    pool.submit(map(request, range(3)))  # worker 1 has 0 and 2, worker 2 has 1

    def one_hangs(c: FakeCluster) -> None:
        clock.now += 1.0
        if c.queues[2] and (clock.now > 6.0 or not c.killed):
            c.finish(2)
        if c.killed:
            c.alive[1] = True

    cluster.act = one_hangs
    check(pool.take(range(3)), [0, 1, 2])
    assert cluster.killed == [1] and [loss.request.request_id for loss in pool.lost] == [0, 2]
    assert said[0][0] == "worker_lost" and "not answered for 5 s, with requests [0, 2] in its hands" in said[0][1]


def test_workers_that_die_again_and_again_are_let_go_and_the_last_ends_the_run(make_pool: Make) -> None:
    pool, cluster = make_pool(2)
    pool.watch.health = Health(Cluster(max_restarts_in_a_row=1, restart_seconds=0.001))
    said: list[str] = []
    pool.watch.say = lambda text, kind="", **facts: said.append(kind)
    cluster.act = lambda c: c.kill(1) if c.queues.get(1) else c.finish(2) if c.queues[2] else None
    pool.submit(map(request, range(4)))
    check(pool.take(range(4)), [0, 1, 2, 3])
    assert said.count("worker_lost") == 2 and said[-1] == "worker_let_go" and cluster.actor_ids() == [2]
    cluster.act = lambda c: c.kill(2)
    pool.submit(map(request, range(4, 6)))
    with pytest.raises(RuntimeError, match=r"0 rollout workers are left, fewer than cluster.min_workers=1"):
        pool.take(range(4, 6))


def test_memory_recycles_a_worker_once_its_hands_are_empty(make_pool: Make) -> None:
    pool, cluster = make_pool(2)
    pool.watch.health = Health(Cluster(worker_memory_gib=2.0))
    cluster.gib[1] = 2.5
    pool.submit(map(request, range(8)))
    check(pool.take(range(8)), list(range(8)))
    pool.poll()
    assert (
        cluster.killed == [1] * len(cluster.killed)
        and cluster.killed
        and not pool.lost
        and not pool.watch.health.deaths
    )


def test_workers_that_never_come_back_are_an_error_too(make_pool: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in anyone's hands then, but somebody waits."""
    pool, cluster = make_pool(2, timeout=5.0)
    clock = SimpleNamespace(now=0.0)

    def sleep(_: float) -> None:
        clock.now += 1.0

    set_clock(monkeypatch, clock, sleep)
    pool.restore = lambda: None
    cluster.act = lambda c: (c.kill(1), c.kill(2))
    pool.submit(map(request, range(3)))
    with pytest.raises(TimeoutError, match=r"queued \[0, 1, 2\], down are workers \[1, 2\]"):
        pool.take(range(3))


def test_waiting_after_a_long_update_is_no_silence(make_pool: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = make_pool(2, timeout=5.0)
    clock = SimpleNamespace(now=0.0)
    set_clock(monkeypatch, clock)
    clock.now = 100.0  # the learner worked, nobody was asked
    pool.submit([request(0)])
    check(pool.take([0]), [0])


def test_busy_seconds_are_those_with_work_in_hand(make_pool: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    set_clock(monkeypatch, clock)
    pool, cluster = make_pool(3)
    cluster.act = lambda _: None
    clock.now = 5.0  # nobody has anything
    pool.submit(map(request, range(4)))  # worker 1 has two, workers 2 and 3 one each
    clock.now = 7.0
    cluster.finish(2)
    cluster.finish(1)
    pool.poll()
    clock.now = 10.0  # workers 1 and 3 are still at it
    assert pool.watch.busy_seconds() == 3 * 2.0 + 2 * 3.0
    cluster.kill(1)
    pool.poll()  # its request goes to worker 2, which had nothing
    clock.now = 11.0
    assert [len(q) for q in cluster.queues.values()] == [0, 1, 1] and pool.watch.busy_seconds() == 2.0
    pool.forget()
    clock.now = 20.0
    assert pool.watch.busy_seconds() == 0.0 and pool.stamps() == {}


def test_requests_are_stamped_when_a_worker_gets_them_and_again_when_it_is_lost(make_pool: Make) -> None:
    pool, cluster = make_pool(1)
    version = 3

    def stamp(asked: RolloutRequest) -> RolloutRequest:
        return replace(asked, policy=PolicyVersion(version=version, weights_hash="", weights=None))

    pool.stamp, pool.restore, cluster.act = stamp, lambda: None, lambda _: None
    pool.submit([request(i, PolicyVersion(version=0, weights_hash="", weights=None)) for i in range(4)])
    assert pool.stamps() == {0: 3, 1: 3, 2: None, 3: None}
    version = 4
    cluster.finish(1)
    pool.poll()
    assert pool.stamps() == {0: 3, 1: 3, 2: 4, 3: None}
    cluster.kill(1)
    pool.poll()
    assert pool.stamps() == {0: 3, 1: None, 2: None, 3: None}
    version, cluster.alive[1], cluster.healthy[1] = 5, True, True
    pool.poll()
    assert pool.stamps() == {0: 3, 1: 5, 2: 5, 3: None}


# -- the asynchronous window -------------------------------------------------------------------------------------------


class Window:
    """The asynchronous stream over a pool, without RLlib: an update is only counted."""

    def __init__(
        self, pool: RolloutPool, *, state: dict[str, Any] | None = None, workers: int = 2, **improve: Any
    ) -> None:
        settings = Improve(mode="async", prompts_per_update=4, **improve)
        config = RunConfig(base={"model": "x"}, improve=settings, rollout={"num_workers": workers})
        self.published = PublishedPolicies()
        self.accounting = Accounting(pool, self.published)
        make = RequestMaker(
            config=config, prompt_count=1000, ships_features=True, latent=True, published=self.published
        )
        self.stream = STREAMS["async"](make, pool, self.accounting)
        self.consumed: list[tuple[int, list[FinishedRequest]]] = []
        self.logged: dict[str, list[float]] = defaultdict(list)
        pool.stamp = self.published.stamp
        if state is not None:
            self.stream.restore(state)
        self.publish((state or {}).get("version", 0))

    @property
    def policy(self) -> PolicyVersion:
        return self.published.current

    def publish(self, version: int) -> None:
        self.published.add(PolicyVersion(version=version, weights_hash=f"hash {version}", weights=None))

    def training_step(self) -> None:
        """``LatentRL``'s, without a learner."""
        batch = self.stream.next_batch()
        check_hashes(batch, self.published.hashes)
        staleness = rollout_metrics(batch, version=self.policy.version, num_actions=2)
        for name, value in (self.stream.metrics | staleness).items():
            self.logged[name].append(value)
        self.consumed.append((self.policy.version, batch))
        self.accounting.record(batch)
        self.publish(self.policy.version + 1)

    def state(self) -> dict[str, Any]:
        """``learner_state`` without a learner."""
        position = self.stream.next_position
        return {"version": self.policy.version, "unasked": self.stream.unfinished(), "next_position": position}

    def prompts(self) -> list[tuple[int, int]]:
        """(seed, prompt) of everything consumed."""
        requests = [a.request for _, answers in self.consumed for a in answers]
        return [pair for r in requests for pair in zip(r.seeds, r.prompt_indices, strict=True)]


def stream(count: int) -> list[tuple[int, int]]:
    """The first prompts of the run, with their seeds."""
    return [
        (rollout_seed(0, u) >> 1, i) for u in range(-(-count // 4)) for i in prompt_indices(u, 4, size=1000, seed=0)
    ][:count]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_no_rollout_is_staler_than_allowed_and_no_prompt_lost_whatever_the_workers_do(
    make_pool: Make, seed: int, max_staleness: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers finish in any order and die; the run is stopped and resumed with another number of them."""
    monkeypatch.setattr(rollout_pool, "MOST_LOSSES", 100)
    chance, state, consumed, updates = random.Random(seed), None, [], 0
    for _ in range(4):
        workers = chance.randint(1, 5)
        pool, _ = make_pool(workers, seed=chance.random(), death=0.15)
        window = Window(pool, state=state, workers=workers, max_staleness=max_staleness)
        for _ in range(chance.randint(1, 12)):
            window.training_step()
            updates += 1
            for _ in range(chance.randrange(3)):
                pool.poll()  # the learner is slow: workers run ahead
            assert len(pool.stamps()) <= (max_staleness + 1) * window.stream.per_update
        consumed += window.prompts()
        state = window.state()
        assert max(window.logged["staleness_max"]) <= max_staleness and min(window.logged["staleness_mean"]) >= 0
    assert state["version"] == updates and len(consumed) == 4 * updates == len(set(consumed))
    wanted = stream(state["next_position"])
    unasked = [wanted[p] for p in state["unasked"]]
    assert sorted(consumed + unasked) == sorted(wanted), "everything asked for is consumed or remembered"


def test_workers_are_served_while_the_learner_works(make_pool: Make) -> None:
    pool, cluster = make_pool(2)
    window = Window(pool, max_staleness=1)
    window.training_step()
    by: list[int] = []
    cluster.act = lambda _: by.append(threading.get_ident())
    with window.stream.serving():
        while len(by) < 3:
            time.sleep(0.01)
    served = len(by)
    time.sleep(0.1)
    assert len(by) == served and threading.get_ident() not in by


def test_what_goes_wrong_while_serving_is_raised_once_the_learner_is_done(make_pool: Make) -> None:
    pool, cluster = make_pool(2)
    window, done = Window(pool, max_staleness=1), list[str]()
    window.training_step()

    def fail(_: FakeCluster) -> None:
        done.append("served")
        raise RunError("too many died")

    cluster.act = fail
    with pytest.raises(RunError, match="too many died"), window.stream.serving():
        while not done:
            time.sleep(0.01)
        done.append("learned")
    assert done == ["served", "learned"]


@pytest.mark.parametrize("stale", ["wait", "drop", "reweight"])
def test_a_straggler_is_waited_for_dropped_or_taken_late(make_pool: Make, stale: str) -> None:
    """Worker 1 finishes nothing before version 4, unless nobody else has anything to do; the bound is 1."""
    pool, cluster = make_pool(2)
    window = Window(pool, max_staleness=1, stale=stale)

    def but_for_one(c: FakeCluster) -> None:
        if c.queues[1] and (window.policy.version >= 4 or (stale == "wait" and not c.queues[2])):
            c.finish(1)
        elif c.queues[2]:
            c.finish(2)

    cluster.act = but_for_one
    for _ in range(8):
        window.training_step()
    first = [version for version, answers in window.consumed for a in answers if a.request.request_id == 0]
    if stale == "wait":
        assert first == [1], "the last update that may have it"
        assert max(window.logged["staleness_max"]) == 1
    elif stale == "drop":
        assert max(window.logged["staleness_max"]) <= 1 and sum(window.logged["stale_dropped"]) > 0
        assert len(set(window.prompts())) == len(window.prompts()) == 32
        assert first and first[0] >= 4, "its prompts were asked for anew"
    else:
        assert max(window.logged["staleness_max"]) > 1 and first[0] >= 4


@pytest.mark.parametrize(("version", "weights"), [(0, "other"), (7, "hash 7"), (0, "hash 0")])
def test_a_rollout_of_unpublished_or_older_weights_is_never_trained_on(
    make_pool: Make, version: int, weights: str
) -> None:
    pool, cluster = make_pool(1)
    window = Window(pool, max_staleness=0, state={"version": 1, "unasked": [], "next_position": 0})
    window.published.hashes[0] = "hash 0"
    honest = cluster.answer

    def liar(worker: int, asked: RolloutRequest) -> Any:
        rollouts, (summary, metrics) = honest(worker, asked)
        return rollouts, (replace(summary, policies=((version, weights, 2),)), metrics)

    cluster.answer = liar  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=rf"sampled with \[\({version}, '{weights}'\)\]"):
        window.training_step()
    assert window.consumed == []
