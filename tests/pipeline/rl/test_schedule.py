"""The schedule of asynchronous updates: hand cases, brute force, and ten thousand random runs."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from pipeline.rl import staleness as schedule


def batch(
    stamps: dict[int, int | None], finished: set[int], version: int, per_update: int = 2, max_staleness: int | None = 1
) -> list[int] | None:
    return schedule.next_batch(stamps, finished, version=version, per_update=per_update, max_staleness=max_staleness)


def test_an_update_takes_what_is_due_first_in_the_order_of_request() -> None:
    assert batch({4: 2, 1: 3, 2: 2, 9: 3}, {4, 1, 2}, 3) == [2, 4]
    assert batch({4: 2, 1: 3, 2: 2, 9: 3}, {4, 1}, 3) is None, "2 is due now and not finished"
    assert batch({4: 2, 1: 3, 2: 2, 9: 3}, {4, 1}, 3, max_staleness=2) == [1, 4], "2 may come one update later"
    assert batch({4: 2, 1: 3, 2: 2, 9: 3}, {4, 1}, 3, max_staleness=None) == [1, 4]
    assert batch({1: 3, 2: None}, {1}, 3) is None


def test_no_update_takes_newer_ones_when_the_older_would_not_fit_into_those_left() -> None:
    """Stamp 4 is due at update 6, which has two places: a third one must be taken by update 5."""
    stamps = {0: 4, 1: 4, 2: 4, 3: 5, 4: 5}
    assert batch(stamps, {3, 4}, 5, max_staleness=2) is None
    assert batch(stamps, {0, 3, 4}, 5, max_staleness=2) == [0, 3]
    assert batch({**stamps, 2: 5}, {3, 4}, 5, max_staleness=2) == [3, 4], "0 and 1 fit into update 6, 2 into 7"


def test_room_and_expired() -> None:
    assert schedule.room({}, per_update=3, max_staleness=2) == 9
    assert schedule.room({1: 0, 2: None}, per_update=1, max_staleness=0) == -1
    assert schedule.expired({1: 3, 2: 4, 3: 0}, [2, 1], version=5, max_staleness=1) == [1]


def feasible(left: list[int], version: int, per_update: int, max_staleness: int) -> bool:
    """Whether all ``left`` (stamps) can be taken in time by the updates from ``version`` on, were they finished."""
    left = sorted(left)
    while left:
        taken, left = left[:per_update], left[per_update:]
        if any(stamp + max_staleness < version for stamp in taken):
            return False
        version += 1
    return True


@pytest.mark.parametrize("seed", range(300))
def test_it_waits_only_when_every_choice_would_break_the_bound(seed: int) -> None:
    chance = random.Random(seed)
    per_update, staleness, version = chance.randint(1, 3), chance.randint(0, 3), 10
    count = chance.randint(0, min(9, (staleness + 1) * per_update))
    stamps: dict[int, int | None] = {i: chance.randint(version - staleness, version) for i in range(count)}
    finished = {i for i in stamps if chance.random() < 0.6}
    possible = [
        taken
        for taken in combinations(sorted(finished), per_update)
        if feasible(
            [s for i, s in stamps.items() if i not in taken and s is not None], version + 1, per_update, staleness
        )
    ]
    chosen = batch(stamps, finished, version, per_update, staleness)
    assert (chosen is None) == (not possible)
    assert chosen is None or tuple(chosen) in possible


class Run:
    """A run of requests through workers that come, go, finish in any order and lose what they hold; no Ray, no
    clock."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.per_update, self.staleness = chance, chance.randint(1, 6), chance.randint(0, 4)
        self.stale = chance.choice(["wait", "drop"])
        self.version = self.next_request = 0
        self.workers = chance.randint(1, 8)
        self.stamps: dict[int, int | None] = {}
        self.finished: set[int] = set()
        self.again: list[int] = []
        self.consumed: set[int] = set()
        self.waited = 0

    def ask(self) -> None:
        for _ in range(schedule.room(self.stamps, per_update=self.per_update, max_staleness=self.staleness)):
            if not self.again:
                self.again, self.next_request = [self.next_request], self.next_request + 1
            self.stamps[self.again.pop(0)] = None

    def work(self) -> None:
        """Free workers take what waits; one of them finishes; now and then one is lost, or the number of workers
        changes."""
        held = [i for i, stamp in self.stamps.items() if stamp is not None and i not in self.finished]
        waiting = [i for i, stamp in self.stamps.items() if stamp is None]
        for request in waiting[: max(0, 2 * self.workers - len(held))]:
            self.stamps[request] = self.version
            held.append(request)
        if held and self.chance.random() < 0.05:
            self.stamps[self.chance.choice(held)] = None
        elif held:
            # Mostly in order; sometimes far out of it.
            self.finished.add(held[0] if self.chance.random() < 0.5 else self.chance.choice(held))
        if self.chance.random() < 0.02:
            self.workers = self.chance.randint(1, 8)

    def update(self) -> None:
        while True:
            if self.stale == "drop":
                for request in schedule.expired(
                    self.stamps, self.finished, version=self.version, max_staleness=self.staleness
                ):
                    self.finished.remove(request)
                    self.stamps[request] = None
            bound = self.staleness if self.stale == "wait" else None
            chosen = batch(self.stamps, self.finished, self.version, self.per_update, bound)
            if chosen is not None:
                break
            self.work()
            self.waited += 1
            assert self.waited < 1000, "it waits for ever"
        self.waited = 0
        for request in chosen:
            stamp = self.stamps.pop(request)
            assert stamp is not None and 0 <= self.version - stamp <= self.staleness, "the bound is broken"
            assert request not in self.consumed, "trained on twice"
            self.consumed.add(request)
            self.finished.remove(request)
        assert len(chosen) == self.per_update

    def resume(self) -> None:
        """Stopped and started again, maybe with other settings: what was open is asked for again."""
        self.again = sorted([*self.stamps, *self.again])
        self.stamps, self.finished = {}, set()
        self.staleness, self.workers = self.chance.randint(0, 4), self.chance.randint(1, 8)


@pytest.mark.parametrize("part", range(10))
def test_the_bound_holds_and_nothing_is_lost_or_doubled_over_ten_thousand_schedules(part: int) -> None:
    for seed in range(part * 1000, (part + 1) * 1000):
        chance = random.Random(seed)
        run = Run(chance)
        for _ in range(chance.randint(3, 15)):
            run.ask()
            run.update()
            for _ in range(chance.randrange(4)):
                run.work()  # while the learner works
            run.version += 1
            if chance.random() < 0.1:
                run.resume()
        assert len(run.consumed) == run.version * run.per_update
        assert run.consumed | run.stamps.keys() | set(run.again) == set(range(run.next_request)), f"seed {seed}"
