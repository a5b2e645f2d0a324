"""What no update may pass: rollouts of unknown weights, too many verifier failures, too many broken updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from configs.schema import Improve
from pipeline.rl.published_policies import PublishedPolicies
from pipeline.rl.rollout_pool import FinishedRequest, RolloutPool
from pipeline.runs.errors import RunError

FAILING_UPDATES = 3


def check_hashes(batch: Sequence[FinishedRequest], published: Mapping[int, str]) -> None:
    """Assert that every rollout was sampled with published weights, and with none older than asked for."""
    for finished in batch:
        asked, found = finished.request.policy, finished.summary.policies
        assert asked is not None and all(v >= asked.version and published.get(v) == h for v, h, _ in found), (
            f"request {finished.summary.request_id}, to be sampled with policy {asked and asked.version}, "
            f"was sampled with {[(v, h[:12]) for v, h, _ in found]}"
        )


class Guards:
    """Checks each batch before its update, and counts the updates that the learner had to skip."""

    def __init__(self, improve: Improve, published: PublishedPolicies, pool: RolloutPool) -> None:
        self.improve, self.published, self.pool = improve, published, pool
        self.skipped = 0
        """Updates skipped so far."""
        self._failing = 0
        """Updates in a row in which verifiers failed too often."""
        self._failure_kinds: set[str] = set()

    def restore(self, skipped: int) -> None:
        """Continue after this many skipped updates."""
        self.skipped = skipped

    def check(self, batch: Sequence[FinishedRequest]) -> None:
        """Pass ``batch`` on to the learner, or raise.

        Raises:
            RunError: ``improve.max_failed_share`` was exceeded in ``FAILING_UPDATES`` updates in a row.
        """
        check_hashes(batch, self.published.hashes)
        self._check_failures(batch)

    def _check_failures(self, batch: Sequence[FinishedRequest]) -> None:
        """Rollouts that verifiers cannot judge are masked; too many of them for too long are no accident."""
        rollouts, failures = sum(one.summary.rollouts for one in batch), sum(one.summary.failures for one in batch)
        reasons = Counter(reason for one in batch for reason in one.summary.failure_kinds)
        update = self.published.current.version + 1
        for name, reason in {reason.partition(":")[0]: reason for reason in reasons}.items():
            if name not in self._failure_kinds:
                self._failure_kinds.add(name)
                self.pool.watch.say(f"a verifier could not judge a rollout: {reason}", "verifier_failed", update=update)
        self._failing = self._failing + 1 if failures > self.improve.max_failed_share * rollouts else 0
        if self._failing >= FAILING_UPDATES:
            raise RunError(
                f"verifiers could not judge {failures} of {rollouts} rollouts ({reasons.most_common(1)[0][0]}), and "
                f"too many in the {FAILING_UPDATES - 1} updates before: repair the reward or the data (latent-control "
                f"task check), or raise improve.max_failed_share={self.improve.max_failed_share:g}"
            )

    def count_skipped(self, reason: str) -> None:
        """Count an update that was skipped, where there is a ``reason``.

        Raises:
            FloatingPointError: more than ``improve.max_skipped_updates`` were.
        """
        self.skipped += bool(reason)
        if self.skipped > self.improve.max_skipped_updates:
            raise FloatingPointError(
                f"update {self.published.current.version + 1} was broken ({reason}), as were {self.skipped - 1} "
                "before; the weights were left as they are and the rollouts lie in quarantine/. Look at rewards and "
                "log-probabilities there, lower improve.learning_rate, or raise "
                f"improve.max_skipped_updates={self.improve.max_skipped_updates}"
            )
