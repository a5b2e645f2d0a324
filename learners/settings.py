"""What the central learner is told, and why it may leave a step out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from configs.schema import Improve


class Fault(IntEnum):
    """Why an update is skipped; the learner's metric ``update_broken``."""

    NONE = 0
    NOT_FINITE = 1
    NOT_FOUND_AGAIN = 2
    LEARNER_DIFFERS = 3

    @property
    def reason(self) -> str:
        """In words; empty for none."""
        return _REASONS[self]


_REASONS = {
    Fault.NONE: "",
    Fault.NOT_FINITE: "its loss or gradient is not finite: look at the rewards",
    Fault.NOT_FOUND_AGAIN: (
        "its log-probabilities are not those of the tokens written: rescored_gap is beyond improve.max_logp_mismatch"
    ),
    Fault.LEARNER_DIFFERS: (
        "worker and learner differ in its log-probabilities: logp_gap is beyond improve.max_logp_mismatch"
    ),
}


@dataclass(frozen=True, kw_only=True)
class LearnerSettings:
    """What ``PolicyLearner`` needs besides RLlib's own config; stands in ``learner_config_dict`` under ``KEY``."""

    improve: Improve
    module: Mapping[str, Any]
    """Arguments of ``build_policy``."""
    sampling: Mapping[str, Any]
    """``temperature`` and ``top_k`` of the policy that sampled."""
    recompute: bool
    """Features come from a base LM of the learner's own; else with the rollouts."""
    reads: str
    """Which base state the policy takes: "late", "final", "both" or "tokens"."""
    late_blocks: int
    dtype: str
    """Of that base LM."""
    span: int
    longest: int
    """Tokens of the longest response."""


KEY = "settings"
