"""The replay buffer as a Ray actor: rollouts go from worker to disk without passing the driver."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.replay.writer import Added, ReplayWriter
from rollout_workers import telemetry


class ReplayActor:
    """A ``ReplayWriter`` behind object references: rollouts go from worker to disk without passing the driver.

    Wrap it: ``ray.remote(num_cpus=0, max_restarts=-1)(ReplayActor).remote(folder, rows_per_shard, run_id)``.
    """

    def __init__(self, folder: Path, rows_per_shard: int, run_id: str) -> None:
        self._writer = ReplayWriter(folder, rows_per_shard, run_id)
        self._run, self._incarnation = run_id, uuid.uuid4().hex

    def add(self, refs: Sequence[Any]) -> Added:
        """Store the lists of rollouts behind ``refs`` (handed over inside a list, so that Ray does not fetch them
        early)."""
        import ray
        from ray.exceptions import ObjectLostError

        rows, duplicates, lost = 0, 0, []
        for ref in refs:
            try:
                added = self._writer.add(ray.get(ref))
            except ObjectLostError as error:
                lost.append(str(error).partition("\n")[0])
                continue
            rows, duplicates = rows + added.rows, duplicates + added.duplicates
        telemetry.count("replay_rows_total", rows, run=self._run)
        return Added(rows=rows, duplicates=duplicates, lost=tuple(lost), actor=self._incarnation)

    def flush(self) -> Added:
        """Write all rows to the disk; ``rows`` counts those stored so far."""
        self._writer.flush()
        return Added(rows=self._writer.rows, duplicates=0, actor=self._incarnation)
