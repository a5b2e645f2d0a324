"""Workers that many runs share: fair shares, mixed calls, and that what goes wrong in one run stays there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake_cluster import FakeCluster, request

from configs.schema import Cluster, RolloutConfig, TaskConfig
from pipeline.rl import rollout_pool, shared_pool, worker_health
from pipeline.rl.shared_pool import FairShares, MemberPool, SharedPool
from pipeline.rl.worker_health import Health
from pipeline.runs.errors import RunError
from rollout_workers.bank_runner import MemberFailed
from rollout_workers.model_host import MemberSettings, WorkerSettings
from rollout_workers.rollouts import PolicyVersion

# A pool that loses a request waits for ever.
pytestmark = pytest.mark.timeout(60)


def settings(name: str, max_new_tokens: int = 10) -> MemberSettings:
    worker = WorkerSettings(
        host=None,
        policy_dtype="float32",
        task=TaskConfig(),
        rollout=RolloutConfig(max_new_tokens=max_new_tokens),
    )
    return MemberSettings(name=name, worker=worker, module={})


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[SharedPool, FakeCluster, Callable[..., MemberPool]]]:
    """``shared(workers, rows)``: the pool, its workers, and how a run joins. Requests are for 2 rollouts each."""

    def make(workers: int, rows: int) -> Any:
        cluster = FakeCluster(workers)
        for module in (rollout_pool, shared_pool, worker_health):
            monkeypatch.setattr(module, "ray", cluster)
        pool = SharedPool(cluster, rows_at_once=rows, timeout=60.0, health=Health(Cluster(restart_seconds=1e-3)))

        def join(name: str, **changes: Any) -> MemberPool:
            member = pool.join(settings(name, **changes), lambda: pool.poll(0.1))
            member.stamp_by(lambda one: replace(one, policy=policy(name)))
            return member

        return pool, cluster, join

    return make


def policy(name: str) -> PolicyVersion:
    return PolicyVersion(version=0, weights_hash=name, weights=None)


def names(cluster: FakeCluster, worker: int) -> list[list[str]]:
    """Whose requests are in the calls that a worker holds."""
    found: list[list[str]] = []
    spy = SimpleNamespace(sample_requests=lambda several: found.append([one.member.name for one in several]))
    for _, _, function in cluster.queues[worker]:
        function(spy)
    return found


def test_fair_shares() -> None:
    shares = FairShares()
    shares.join("a")
    shares.charge("a", 100)
    shares.join("b")
    assert shares.first(["a", "b"]) == "a", "who comes late starts level, not 100 ahead"
    shares.charge("a", 8)
    assert shares.first(["a", "b"]) == "b"
    shares.charge("b", 9)
    assert shares.first(["a", "b"]) == "a" and shares.first(["b"]) == "b"
    shares.leave("a")
    shares.join("c")
    assert shares.had == {"b": 109, "c": 109}


def test_a_call_has_rows_of_those_who_had_the_least(shared: Any) -> None:
    pool, cluster, join = shared(1, 8)
    greedy, modest, long = join("greedy"), join("modest"), join("long", max_new_tokens=20)
    cluster.kill(1)
    cluster.healthy[1] = False
    greedy.submit(request(number) for number in range(6))
    modest.submit([request(0), request(1)])
    long.submit([request(0), request(1)])
    cluster.alive[1] = cluster.healthy[1] = True
    pool.poll()
    # 8 rows are 4 requests. Of equals the first; a request of "long" (20 tokens at most, not 10) counts twice.
    first, second = names(cluster, 1)
    assert first == ["greedy", "modest", "long", "greedy"] and second == ["modest", "greedy", "long", "greedy"]


def test_each_run_gets_its_own_answers_under_its_own_numbers(shared: Any) -> None:
    pool, _, join = shared(2, 6)
    first, second = join("first"), join("second")
    for member in (first, second):
        member.submit(request(number) for number in (5, 3, 4))
    for member, name in ((second, "second"), (first, "first")):
        answers = member.take([3, 4, 5])
        assert [(a.request.request_id, a.summary.request_id) for a in answers] == [(n, n) for n in (3, 4, 5)]
        assert {a.request.policy for a in answers} == {policy(name)}
        assert member.stamps() == {} and not member.asked
    assert not pool.waiting and not pool.running and not pool.finished


def test_one_that_fails_ends_alone_and_the_others_requests_are_done(shared: Any) -> None:
    pool, cluster, join = shared(1, 4)
    ill, well = join("ill"), join("well")
    cluster.act = lambda one: None
    for member in (ill, well):
        member.submit([request(0)])
    pool.poll()
    cluster.fail(1, MemberFailed("ill", "ValueError: no such file"))
    for worker in list(cluster.queues):
        while cluster.queues[worker]:
            cluster.finish(worker)
    cluster.act = FakeCluster.by_chance
    assert [a.request.request_id for a in well.take([0])] == [0]
    with pytest.raises(RunError, match="no such file"):
        ill.take([0])
    ill.stop()
    well.submit([request(1)])
    assert well.take([1]) and pool.members.keys() == {"well"}


def test_what_kills_workers_is_found_and_ends_its_run_alone(shared: Any) -> None:
    """A call with a deadly request is lost; then its requests go one by one, until it is clear whose fault it is."""
    _, cluster, join = shared(1, 8)
    deadly, well = join("deadly"), join("well")

    def act(_: FakeCluster) -> None:
        if cluster.queues[1]:
            if any("deadly" in call for call in names(cluster, 1)[:1]):
                cluster.kill(1)
            else:
                cluster.finish(1)

    cluster.act = act
    deadly.submit([request(0)])
    well.submit([request(0), request(1)])
    assert [a.request.request_id for a in well.take([0, 1])] == [0, 1]
    with pytest.raises(RunError, match="lost with its worker"):
        deadly.take([0])
    assert cluster.deaths == 3 and {loss.request.request_id for loss in well.take_lost()} == {0, 1}


def test_a_run_that_leaves_takes_its_requests_along(shared: Any) -> None:
    pool, cluster, join = shared(1, 2)
    gone, stays = join("gone"), join("stays")
    cluster.act = lambda one: None
    for member in (gone, stays):
        member.submit(request(number) for number in range(4))
    gone.stop()
    assert {one.member.name for one in pool.waiting} == {"stays"}
    cluster.act = FakeCluster.by_chance
    assert len(stays.take(range(4))) == 4
    again = join("gone")  # stopped and started again
    again.submit([request(0)])
    assert [a.request.request_id for a in again.take([0])] == [0] and not pool.running


def test_an_asynchronous_run_sees_the_policies_of_its_own_requests(shared: Any) -> None:
    _, cluster, join = shared(1, 2)
    one, other = join("one"), join("other")
    cluster.act = lambda _: None
    other.submit([request(7)])
    one.submit(request(number) for number in range(3))
    assert one.stamps().keys() == {0, 1, 2} and other.stamps() == {7: 0}
    assert list(one.stamps().values()).count(None) == 2, "a worker holds two calls"
    one.forget()
    assert one.stamps() == {} and other.stamps() == {7: 0}
