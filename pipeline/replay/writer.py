"""The replay buffer: append-only Parquet shards, one row per rollout, readable without this code.

    <run>/replay/run=<run id>/part-00000000-<sha8>.parquet   zstd, row groups of 256
    <run>/replay/run=<run id>/_manifest.json                 the complete shards with their hashes, written last
    <run>/replay/_quarantine/...                             damaged or foreign files, each with a reason file

``pandas.read_parquet("<run>/replay")`` and duckdb's ``read_parquet('<run>/replay/run=*/*.parquet')`` give the rows of
``SCHEMA``, whose fields carry their own description. Parquet readers ignore names that start with ``_`` or ``.``.
A shard is written to a hidden name, synced, renamed, then entered into the manifest; one that a kill left between the
last two steps is adopted if the hash in its name matches. Delivery is exactly once: rows are known by ``rollout_id``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.replay.pending import Pending
from pipeline.replay.schema import ENCODING, MANIFEST, METADATA, ROW_GROUP, SCHEMA, SCHEMA_VERSION, SHARD_NAME
from pipeline.replay.shards import lost_before, open_partition, read_column
from pipeline.storage.atomic import fsync_file, fsync_folder, sealed, sha256_file, write_atomic
from rollout_workers.rollouts import Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Added:
    """The outcome of ``add``. ``Added(rows=15, duplicates=1)``."""

    rows: int
    duplicates: int
    lost: tuple[str, ...] = ()
    """Object references whose owner died before they could be read."""
    actor: str = ""
    """Which incarnation of a ``ReplayActor`` took them: rows that an earlier one had not put on the disk are gone."""


def to_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """Rollouts as a table of ``SCHEMA``; token columns are concatenated, never looped over."""
    columns: dict[str, Any] = {}
    for field in SCHEMA:
        if pa.types.is_list(field.type):
            arrays = [np.ravel(getattr(r, field.name)) for r in rollouts]
            offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
            values = np.concatenate(arrays) if arrays else np.empty(0)
            values = values.view(np.int8) if values.dtype == bool else values
            columns[field.name] = pa.ListArray.from_arrays(
                offsets, pa.array(values, field.type.value_type), type=field.type
            )
    columns["prompt_length"] = [len(r.prompt_tokens) for r in rollouts]
    columns["length"] = [len(r.tokens) for r in rollouts]
    columns["reward_parts"] = [list(r.reward_parts.items()) for r in rollouts]
    columns["failure_kind"] = [r.failure and r.failure.partition(":")[0] for r in rollouts]
    columns["created"] = [round(r.created * 1e6) for r in rollouts]
    rest = [name for name in SCHEMA.names if name not in columns]
    columns |= zip(
        rest, zip(*map(attrgetter(*rest), rollouts), strict=True) if rollouts else [()] * len(rest), strict=True
    )
    arrays = [
        c if isinstance(c, pa.Array) else pa.array(c, SCHEMA.field(n).type)
        for n, c in ((f.name, columns[f.name]) for f in SCHEMA)
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


class ReplayWriter:
    """Appends rollouts to ``folder/run=<run_id>``. One writer per run at a time; opening it again continues.

    Rows wait in memory until ``rows_per_shard`` are there, ``flush`` or ``close``.
    """

    def __init__(self, folder: Path, rows_per_shard: int, run_id: str) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}; it must be at least 1")
        if not re.fullmatch(r"[^/\\%=\x00-\x1f]+", run_id):
            raise ValueError(
                f"run_id is {run_id!r}; it names a folder: leave out '/', '\\', '%', '=' and control characters"
            )
        self._root, self._partition = Path(folder), Path(folder) / f"run={run_id}"
        self._rows_per_shard, self._run_id = rows_per_shard, run_id
        self._partition.mkdir(parents=True, exist_ok=True)
        for unfinished in self._partition.glob(".part-*.tmp"):
            unfinished.unlink()
        shards, self.quarantined = open_partition(self._root, self._partition)
        names = [shard.path.name for shard in shards] + [Path(q.shard).name for q in self.quarantined]
        self._next = 1 + max((int(match[1]) for name in names if (match := SHARD_NAME.fullmatch(name))), default=-1)
        self._entries = [shard.entry for shard in shards]
        # A reader that opens the buffer later must still be able to tell that rows are missing.
        self._lost = lost_before(self._partition) + [
            {"name": Path(q.shard).name, "reason": q.reason} for q in self.quarantined
        ]
        self._seen = {rollout_id for shard in shards for rollout_id in read_column(shard, "rollout_id")}
        self._pending: list[Rollout] = []
        self._shown = Pending(self._partition)
        self._write_manifest()

    @property
    def rows(self) -> int:
        """Rows taken in, those still in memory included."""
        return sum(entry["rows"] for entry in self._entries) + len(self._pending)

    def add(self, rollouts: Sequence[Rollout]) -> Added:
        """Take in rollouts that are not there yet; ``ValueError`` when one's columns differ in length (none is
        taken)."""
        for rollout in rollouts:
            lengths = len(rollout.tokens), len(rollout.actions), len(rollout.action_logp)
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"rollout {rollout.rollout_id}: tokens, actions and action_logp have lengths {lengths}; they must "
                    "be equal"
                )
            if len(rollout.generated) not in (0, len(rollout.tokens)):
                raise ValueError(
                    f"rollout {rollout.rollout_id}: {len(rollout.generated)} marks generated for {lengths[0]} tokens"
                )
        before, waiting = len(self._seen), len(self._pending)
        for rollout in rollouts:
            if rollout.rollout_id not in self._seen:
                self._seen.add(rollout.rollout_id)
                self._pending.append(rollout)
        if waiting < len(self._pending) < self._rows_per_shard:
            self._shown.show(to_table(self._pending[waiting:]))
        while len(self._pending) >= self._rows_per_shard:
            self._write_shard(self._rows_per_shard)
        rows = len(self._seen) - before
        return Added(rows=rows, duplicates=len(rollouts) - rows)

    def flush(self) -> None:
        """Write all rows taken in to the disk (before a checkpoint that relies on them)."""
        if self._pending:
            self._write_shard(len(self._pending))

    def close(self) -> None:
        """The last flush."""
        self.flush()

    def _write_shard(self, rows: int) -> None:
        rollouts = self._pending[:rows]
        table = to_table(rollouts)
        versions = [r.policy_version for r in rollouts]
        about: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "run_id": self._run_id, "rows": rows}
        about |= {"min_policy_version": min(versions), "max_policy_version": max(versions)}
        hashes = {
            f"{name}es": sorted({getattr(r, name) for r in rollouts})
            for name in ("policy_hash", "world_hash", "codebook_hash")
        }
        staged = self._partition / f".part-{self._next:08d}.tmp"
        table = table.replace_schema_metadata({METADATA: json.dumps(about | hashes)})
        pq.write_table(table, staged, row_group_size=ROW_GROUP, write_page_checksum=True, **ENCODING)
        fsync_file(staged)
        digest = sha256_file(staged)
        path = self._partition / f"part-{self._next:08d}-{digest[:8]}.parquet"
        entry = {"name": path.name, "sha256": digest, "bytes": staged.stat().st_size} | about
        os.replace(staged, path)
        fsync_folder(self._partition)
        self._entries.append(entry)
        self._write_manifest()
        self._next += 1
        # Only now: a failed write (disk full) keeps the rows, and the next flush tries again.
        del self._pending[:rows]
        self._shown.clear()
        if self._pending:
            self._shown.show(to_table(self._pending))

    def _write_manifest(self) -> None:
        content = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self._run_id,
            "shards": self._entries,
            "lost": self._lost,
        }
        write_atomic(self._partition / MANIFEST, sealed(content))
