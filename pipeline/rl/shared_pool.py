"""Rollout workers that many runs share: one queue, from which each call takes rows of several policies, in fair
shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Any

import ray

from pipeline.rl.rollout_pool import FinishedRequest, LostRequest, RolloutPool
from pipeline.rl.worker_health import WorkerWatch
from pipeline.runs.errors import RunError, first_line
from rollout_workers.bank_runner import MemberFailed
from rollout_workers.model_host import MemberSettings, WorkerSettings
from rollout_workers.rollouts import RolloutRequest, RolloutSummary


class FairShares:
    """Who is next: the one that has had the least. Who comes late starts level with those that have had the least, so
    that nobody stands still until it has caught up.

    ``FairShares()`` with ``join("a")``, ``join("b")``, ``charge("a", 128)``: ``first(["a", "b"])`` is ``"b"``.
    """

    def __init__(self) -> None:
        self.had: dict[str, float] = {}
        """Units of work by name."""

    def join(self, name: str) -> None:
        """Start to count for ``name``."""
        self.had[name] = min(self.had.values(), default=0.0)

    def leave(self, name: str) -> None:
        """``name`` asks for nothing more."""
        del self.had[name]

    def charge(self, name: str, units: float) -> None:
        """``name`` gets so much."""
        self.had[name] += units

    def first(self, names: Iterable[str]) -> str:
        """Of ``names``, the one that has had the least; of equals the first one."""
        return min(names, key=self.had.__getitem__)


class SharedPool(RolloutPool):
    """A ``RolloutPool`` over workers of many policies (``BankEnvRunner``); each run has a ``MemberPool`` of it.

    What goes wrong in one run's task, verifier or requests ends that run; what happens to the workers concerns all.
    Requests are numbered here in the order in which they come, since runs count alike.
    """

    def __init__(self, group: Any, *, rows_at_once: int, **settings: Any) -> None:
        """``rows_at_once``: rollouts of a call at most. ``settings`` are those of ``RolloutPool``."""
        super().__init__(group, **settings)
        self.group, self.rows_at_once = group, rows_at_once
        self.members: dict[str, MemberPool] = {}
        self.shares = FairShares()
        self.stamp = lambda request: self.members[request.member.name].stamp(request)
        self._numbers = itertools.count()
        self._call_rows = rows_at_once

    def join(self, settings: MemberSettings, wait: Callable[[], None]) -> MemberPool:
        """The pool of one run, from now on; ``wait`` is called where it waits for rollouts, and lets others work."""
        self.shares.join(settings.name)
        self.members[settings.name] = pool = MemberPool(self, settings, wait)
        return pool

    def leave(self, name: str) -> None:
        """Forget a run; what workers are at for it is thrown away."""
        self.members.pop(name).forget()
        self.shares.leave(name)

    def ask(self, member: MemberPool, requests: Iterable[RolloutRequest]) -> list[int]:
        """Queue a member's requests; their numbers here."""
        numbered = [replace(one, request_id=next(self._numbers), member=member.settings) for one in requests]
        self.submit(numbered)
        return [request.request_id for request in numbered]

    def drop(self, numbers: Iterable[int]) -> None:
        """Take requests out of the queue; those that a worker is at are thrown away when they come."""
        gone = set(numbers)
        kept = [request for request in self.waiting if request.request_id not in gone]
        self.waiting.clear()
        self.waiting.extend(kept)
        for number in gone:
            self.losses.pop(number, None)
            del self._handed[number]  # a Counter: no error where it has none

    def _dispatch(self) -> None:
        """An equal part of what waits for everyone who can work."""
        able = max(1, len(self.watch.able()))
        self._call_rows = min(self.rows_at_once, math.ceil(sum(map(rows_of, self.waiting)) / able))
        super()._dispatch()

    def _next_call(self) -> list[RolloutRequest]:
        """Requests of those who have had the least, together at most ``rows_at_once`` rollouts and a worker's part of
        the queue (one request at least). One that was lost with its worker goes alone: it may be at fault."""
        call: list[RolloutRequest] = []
        rows = 0
        while self.waiting:
            name = self.shares.first(request.member.name for request in self.waiting)
            request = next(one for one in self.waiting if one.member.name == name)
            alone = request.request_id in self.losses
            if call and (alone or rows + rows_of(request) > self._call_rows):
                break
            self.waiting.remove(request)
            call.append(request)
            rows += rows_of(request)
            self.shares.charge(name, rows_of(request) * request.member.worker.rollout.max_new_tokens)
            if alone:
                break
        return call

    def _work(self, requests: tuple[RolloutRequest, ...]) -> Any:
        return methodcaller("sample_requests", requests)

    def _answers(self, report: Any) -> list[tuple[RolloutSummary, dict[str, Any]]]:
        answers: list[tuple[RolloutSummary, dict[str, Any]]] = report
        return answers

    def _collect(self, ready: list[ray.ObjectRef]) -> None:
        """As any pool, call by call: one that failed by the fault of a member ends that member's run; the others'
        requests are asked for again."""
        for report in ready:
            try:
                super()._collect([report])
            except MemberFailed as failed:
                call = self.running.pop(report)
                self.watch.received(call.worker)
                for rollouts in call.rollouts:  # whose errors Ray would print, were they not looked at
                    with suppress(MemberFailed):
                        ray.get(rollouts)
                self._requeue(one for one in call.requests if one.member.name != failed.member)
                if failed.member in self.members:
                    self.members[failed.member].fail(f"a rollout worker could not go on: {failed.reason}")

    def _finish(self, finished: FinishedRequest) -> None:
        number = finished.request.request_id
        del self._handed[number]
        if member := self._asked_by(finished.request):
            member.receive(number, finished)

    def _note_lost(self, lost: LostRequest) -> None:
        if member := self._asked_by(lost.request):
            member.note_lost(lost)

    def _give_up(self, request: RolloutRequest, error: Exception) -> None:
        """Only the run whose request it is ends."""
        self.drop([request.request_id])
        if member := self._asked_by(request):
            member.fail(
                f"its request for prompts {request.prompt_indices} was lost with its worker again and again; last: "
                f"{first_line(error)}"
            )

    def _requeue(self, requests: Iterable[RolloutRequest]) -> None:
        """Put requests back, but for those that nobody waits for any more."""
        super()._requeue(request for request in requests if self._asked_by(request))

    def _asked_by(self, request: RolloutRequest) -> MemberPool | None:
        """The run that waits for a request."""
        member = self.members.get(request.member.name)
        return member if member is not None and request.request_id in member.asked else None


class MemberWatch(WorkerWatch):
    """The watch over shared workers, with the voice of one run."""

    def __init__(self, shared: WorkerWatch) -> None:
        super().__init__(shared.workers, timeout=shared.timeout, health=shared.health)
        self.shared, self._told = shared, shared.busy_in_all()

    def busy_seconds(self) -> float:
        """Seconds since the last call that workers had work in their hands, for whatever run."""
        before, self._told = self._told, self.shared.busy_in_all()
        return self._told - before


class MemberPool(RolloutPool):
    """What one run sees of a ``SharedPool``: its own requests."""

    def __init__(self, shared: SharedPool, settings: MemberSettings, wait: Callable[[], None]) -> None:
        super().__init__(shared.group, timeout=shared.watch.timeout, node=shared.node, health=shared.watch.health)
        self.shared, self.settings, self.pause = shared, settings, wait
        self.watch: MemberWatch = MemberWatch(shared.watch)
        self.asked: dict[int, int] = {}
        """The run's own number of each request that is open, by the shared one."""
        self.failure = ""

    def stop(self) -> None:
        """The run ends; the workers go on for the others."""
        self.shared.leave(self.settings.name)

    def stamp_by(self, stamp: Callable[[RolloutRequest], RolloutRequest]) -> None:
        """Sample requests with the policy that ``stamp`` puts on them when a worker gets them."""
        self.stamp = stamp

    def submit(self, requests: Iterable[RolloutRequest]) -> None:
        """Queue requests; they start as workers are free."""
        requests = list(requests)
        self.asked |= zip(self.shared.ask(self, requests), (one.request_id for one in requests), strict=True)

    def poll(self, seconds: float = 0.0) -> None:
        """Let the others work until something may have come; without ``seconds`` look for what has.

        Raises:
            RunError: this run cannot go on.
        """
        if seconds:
            self.pause()
        else:
            self.shared.poll()
        if self.failure:
            raise RunError(self.failure)

    def stamps(self) -> dict[int, int | None]:
        """Every open request's policy version, ``None`` while it waits for a worker."""
        own = {self.asked[number]: version for number, version in self.shared.stamps().items() if number in self.asked}
        return own | super().stamps()

    def forget(self) -> None:
        """Drop all requests; what a worker is at is finished and thrown away."""
        self.shared.drop(self.asked)
        self.asked.clear()
        self.finished.clear()
        self.lost.clear()

    def receive(self, number: int, finished: FinishedRequest) -> None:
        """Take a finished request, under its own number again."""
        own = self.asked.pop(number)
        self.finished[own] = replace(
            finished,
            request=replace(finished.request, request_id=own, member=None),
            summary=replace(finished.summary, request_id=own),
        )

    def note_lost(self, lost: LostRequest) -> None:
        """One of its requests came to nothing in a worker's hands."""
        own = self.asked[lost.request.request_id]
        self.lost.append(replace(lost, request=replace(lost.request, request_id=own, member=None)))

    def fail(self, reason: str) -> None:
        """End this run, and no other, with this reason."""
        self.failure = reason

    def _requeue(self, requests: Iterable[RolloutRequest]) -> None:
        """Rollouts that went with their node are asked for again."""
        self.submit(requests)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a run is given of the workers that it shares."""

    name: str
    pool: SharedPool
    pause: Callable[[], None]
    """Lets the other runs go on for a while"""
    replay: Any
    """Handle of a ``SharedReplayActor``"""

    def join(self, worker: WorkerSettings, module: Mapping[str, Any]) -> MemberPool:
        """The run's own pool; ``module``: its policy's RLModule."""
        return self.pool.join(MemberSettings(name=self.name, worker=worker, module=module), self.pause)


def rows_of(request: RolloutRequest) -> int:
    """How many rollouts a request is for."""
    return len(request.seeds) * request.group_size
