"""The accounts of an RL stage: which prompts are open, a ledger row per attempt, the rollouts of every update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import ray

from pipeline.replay.actor import ReplayHandle
from pipeline.replay.writer import Added
from pipeline.rl.ledger import Attempt, Ledger, Outcome
from pipeline.rl.published_policies import PublishedPolicies
from pipeline.rl.rollout_pool import FinishedRequest, PartLost, RolloutPool
from rollout_workers.rollouts import Rollout, RolloutRequest

TIED = "all rewards of the group are equal"
PASSED = "the prompt's last group had equal rewards"
"""Why a position was not trained on."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """Where a stage keeps what happens to its rollouts; what is ``None`` is not kept."""

    ledger: Ledger | None = None
    replay: ReplayHandle | None = None
    quarantine: Callable[[int, list[Rollout], str], None] | None = None
    """Keeps the rollouts of an update that was skipped for a reason."""


class Accounting:
    """Knows every prompt asked for and not yet trained on, and records the outcome of each attempt."""

    def __init__(self, pool: RolloutPool, published: PublishedPolicies) -> None:
        self.pool, self.published = pool, published
        self.open: dict[int, tuple[int, ...]] = {}
        """Positions in the stream of prompts by request, for those asked for and not yet trained on."""
        self.attach(Records())

    def attach(self, records: Records) -> None:
        """Record into ``records`` from now on."""
        self.records = records
        self._writing: ray.ObjectRef | None = None
        self._replay_actor = ""
        """The incarnation of the replay buffer's actor that has what is not on the disk yet."""

    def record(self, batch: Sequence[FinishedRequest], skipped: str = "") -> None:
        """Enter the batch of an update into the ledger and store its rollouts: in quarantine if the update was
        ``skipped`` (the reason), else in the replay buffer."""
        outcome: Outcome = "skipped" if skipped else "trained"
        self.note([entry for finished in batch for entry in self.entries(finished, outcome, skipped)])
        for finished in batch:
            del self.open[finished.request.request_id]
        if not skipped:
            self._store([finished.rollouts for finished in batch])
        elif self.records.quarantine is not None:
            rollouts = [rollout for finished in batch for rollout in ray.get(finished.rollouts)]
            self.records.quarantine(self.published.current.version + 1, rollouts, skipped)

    def note(self, attempts: Sequence[Attempt]) -> None:
        """Enter attempts into the ledger, after those that workers have lost meanwhile."""
        lost = self.pool.take_lost()
        if self.records.ledger is None:
            return
        for one in lost:
            if one.request.request_id in self.open:  # others are of evaluation
                self.records.ledger.add(
                    self._attempts(one.request, one.attempt, worker=one.worker, outcome="lost", reason=one.reason)
                )
        self.records.ledger.add(attempts)

    def entries(self, finished: FinishedRequest, outcome: Outcome, reason: str = "") -> list[Attempt]:
        """The ledger's rows for a finished request; groups that were left out are ``tied``."""
        summary, size = finished.summary, finished.request.group_size
        versions = [version for version, _, _ in summary.policies]
        attempts = self._attempts(
            finished.request, finished.attempt, worker=summary.worker, outcome=outcome, reason=reason
        )
        rows = [
            replace(
                attempt,
                oldest_version=min(versions, default=-1),
                newest_version=max(versions, default=-1),
                rollouts=summary.rollout_ids[i * size : (i + 1) * size],
                successes=sum(summary.successes[i * size : (i + 1) * size]),
                equal_rewards=equal,
            )
            for i, (attempt, equal) in enumerate(zip(attempts, finished.equal_rewards, strict=True))
        ]
        return [
            replace(row, outcome="tied", reason=TIED) if i in finished.left_out else row for i, row in enumerate(rows)
        ]

    def passed(self, positions: Mapping[int, int]) -> None:
        """Enter positions, with their prompts, that the curriculum passed over."""
        update = self.published.current.version + 1
        self.note(
            [
                Attempt(
                    position=position,
                    attempt=0,
                    prompt_index=index,
                    outcome="passed",
                    reason=PASSED,
                    update=update,
                    request=position,
                    worker=-1,
                )
                for position, index in positions.items()
            ]
        )

    def _attempts(
        self, request: RolloutRequest, attempt: int, *, worker: int, outcome: Outcome, reason: str
    ) -> list[Attempt]:
        return [
            Attempt(
                position=position,
                attempt=attempt,
                prompt_index=index,
                outcome=outcome,
                reason=reason,
                update=self.published.current.version + 1,
                request=request.request_id,
                worker=worker,
            )
            for position, index in zip(self.open[request.request_id], request.prompt_indices, strict=True)
        ]

    def flush(self, unfinished: Sequence[int]) -> None:
        """Put rollouts and ledger on the disk up to the current policy.

        Raises:
            PartLost: rollouts were lost before they were stored.
        """
        if self.records.replay is not None:
            self._await_stored()
            self._stored(ray.get(self.records.replay.flush()))
            self._replay_actor = ""
        if self.records.ledger is not None:
            self.note([])
            self.records.ledger.flush(self.published.current.version, self.published.hashes, unfinished)

    def stop(self) -> None:
        """Stop the replay buffer's actor; ``flush`` first what is to be kept."""
        if self.records.replay is not None:
            self.records.replay.stop()

    def _store(self, refs: list[ray.ObjectRef]) -> None:
        """Hand the rollouts to the replay buffer; one batch may be on its way while the learner works."""
        if self.records.replay is not None:
            self._await_stored()
            self._writing = self.records.replay.add(refs)

    def _await_stored(self) -> None:
        if self._writing is not None:
            self._stored(ray.get(self._writing))
            self._writing = None

    def _stored(self, added: Added) -> None:
        if added.lost:
            raise PartLost(
                f"{len(added.lost)} batches of rollouts were lost before they reached the replay buffer: "
                f"{added.lost[0]}"
            )
        if self._replay_actor and added.actor != self._replay_actor:
            raise PartLost("the replay buffer's actor died with rollouts that were not on the disk yet")
        self._replay_actor = added.actor
