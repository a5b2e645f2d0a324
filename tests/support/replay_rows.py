"""Rollouts by number, and replay folders filled with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.replay.writer import ReplayWriter
from rollout_workers.rollouts import Rollout


def rollout(index: int, **changes: object) -> Rollout:
    length = 1 + index % 7
    made = Rollout(
        rollout_id=f"run/{index}",
        group_id=f"run/g{index // 4}",
        prompt_id=f"counter/train/{index // 4}",
        prompt_text=f"count {index} ü",
        text="x" * length,
        prompt_tokens=np.arange(index % 5, dtype=np.int32),
        tokens=np.arange(length, dtype=np.int32) + index,
        actions=np.arange(length, dtype=np.int32) % 3,
        action_logp=-np.arange(length, dtype=np.float32) / 7,
        finish_reason="stop",
        reward=index % 4 / 2,
        reward_parts={"format": 1.0, "success": index % 2},
        success=index % 4 == 2,
        failure=None,
        policy_version=index // 8,
        policy_hash=f"p{index // 8}",
        world_hash="w",
        codebook_hash="c",
        level="latent",
        seed=2**63 - 1 - index,
        worker=1,
        created=1.7e9 + index + 0.125,
    )
    return replace(made, **changes)


def fill(folder: Path, count: int, rows_per_shard: int = 16, run_id: str = "a", first: int = 0) -> ReplayWriter:
    writer = ReplayWriter(folder, rows_per_shard, run_id)
    writer.add([rollout(i) for i in range(first, first + count)])
    writer.close()
    return writer
