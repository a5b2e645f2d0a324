"""The evaluation's answers as a table that is searched as the rollouts of training are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.evaluation.outcomes import Outcome
from pipeline.replay.following import COLUMNS
from pipeline.replay.schema import SCHEMA

FIELDS = [*(SCHEMA.field(name) for name in COLUMNS), pa.field("variant", pa.string()), pa.field("sample", pa.int32())]
EMPTY: dict[str, Any] = {
    "prompt_tokens": [],
    "tokens": [],
    "generated": [],
    "actions": [],
    "action_logp": [],
    "turn_rewards": [],
}


def heldout_table(outcomes: Sequence[Outcome]) -> pa.Table:
    """``RolloutFollower.table`` of outcomes: a prompt is a group, and the mode stands for the finish reason. Tokens and
    codes are not kept in an evaluation."""
    rows: list[dict[str, Any]] = [
        {
            "rollout_id": f"{one.variant}/{one.mode}/{one.prompt_id}/{one.sample}",
            "group_id": one.prompt_id,
            "prompt_id": one.prompt_id,
            "prompt_text": one.prompt,
            "text": one.response,
            "finish_reason": one.mode,
            "reward": one.reward,
            "reward_parts": list(one.reward_parts.items()),
            "success": one.success,
            "failure": None if one.reward is not None else "the verifier failed",
            "policy_version": 0,
            "level": one.variant,
            "world_hash": "",
            "variant": one.variant,
            "sample": one.sample,
            **EMPTY,
        }
        for one in reversed(outcomes)  # the newest come first on the page
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(FIELDS))
