"""Rollouts of a run as MLflow traces: which ones, and what each says. A bounded number, spread evenly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.outcome_file import read_outcomes
from pipeline.evaluation.outcomes import Outcome
from pipeline.replay.reader import ReplayReader
from pipeline.runs.layout import OUTCOMES, REPLAY

COLUMNS = (
    "rollout_id",
    "group_id",
    "prompt_id",
    "prompt_text",
    "text",
    "actions",
    "finish_reason",
    "reward",
    "reward_parts",
    "success",
    "failure",
    "policy_version",
    "level",
    "created",
)
ROW_GROUPS = 64
"""Most that are read of a replay buffer, spread evenly over training."""


@dataclass(frozen=True, kw_only=True)
class RolloutTrace:
    """A prompt with its response: ``RolloutTrace(key="train-7-0", name="rollout", prompt="3 7 -> 10 :", outputs=
    {"response": "3 + 7"}, created=1.7e9, reward=1.0, success=True, tags={"policy_version": "12"})``."""

    key: str
    """Its own within the MLflow run: what is sent twice is stored once."""
    name: str
    prompt: str
    outputs: Mapping[str, Any]
    """Its ``response`` first."""
    created: float
    """Unix time."""
    reward: float | None
    """``None``: the verifier failed."""
    success: bool
    tags: Mapping[str, str] = field(default_factory=dict)


def rollout_traces(run_dir: Path, level: str, most: int) -> list[RolloutTrace]:
    """At most ``most`` training rollouts of a ``level``; none without a replay buffer."""
    if not (run_dir / REPLAY).is_dir():
        return []
    groups = sum(shard.footer.num_row_groups for shard in ReplayReader(run_dir / REPLAY, columns=COLUMNS).shards)
    share = max(1, math.ceil(groups / ROW_GROUPS))
    reader = ReplayReader(run_dir / REPLAY, columns=COLUMNS, shuffle=False, world=share)
    return [_of_rollout(row) for row in _spread([row for row in reader.rows() if row["level"] == level], most)]


def _of_rollout(row: Mapping[str, Any]) -> RolloutTrace:
    tags = {name: str(row[name]) for name in ("rollout_id", "group_id", "prompt_id", "finish_reason", "policy_version")}
    return RolloutTrace(
        key=row["rollout_id"],
        name="rollout",
        prompt=row["prompt_text"],
        outputs={
            "response": row["text"],
            "codes": row["actions"].tolist() if row["level"] == "latent" else None,
            "reward_parts": row["reward_parts"],
            "failure": row["failure"],
        },
        created=row["created"].timestamp(),
        reward=row["reward"],
        success=row["success"],
        tags=tags,
    )


def heldout_traces(run_dir: Path, most: int) -> list[RolloutTrace]:
    """At most ``most`` rollouts of the evaluation: all of a prompt's, of all models, so that they can be compared."""
    if not (run_dir / OUTCOMES).is_file():
        return []
    created = (run_dir / OUTCOMES).stat().st_mtime
    by_prompt: dict[str, list[Outcome]] = {}
    for one in read_outcomes(run_dir / OUTCOMES):
        by_prompt.setdefault(one.prompt_id, []).append(one)
    prompts = _spread(list(by_prompt), most // max((len(found) for found in by_prompt.values()), default=1))
    return [
        RolloutTrace(
            key=f"{one.variant}/{one.mode}/{one.prompt_id}/{one.sample}",
            name=f"held-out, {one.variant}",
            prompt=one.prompt,
            outputs={"response": one.response, "reward_parts": dict(one.reward_parts)},
            created=created,
            reward=one.reward,
            success=one.success,
            tags={"model": one.variant, "mode": one.mode, "prompt_id": one.prompt_id, "sample": str(one.sample)},
        )
        for prompt in prompts
        for one in by_prompt[prompt]
    ]


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places]
