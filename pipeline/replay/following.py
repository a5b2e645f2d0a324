"""Follows the replay buffer of a run while it grows; changes nothing in it."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.replay.pending import PENDING, read_pending
from pipeline.replay.reader import completed
from pipeline.replay.schema import SCHEMA
from pipeline.replay.shards import verified

COLUMNS = [
    "rollout_id",
    "group_id",
    "prompt_id",
    "prompt_text",
    "prompt_tokens",
    "text",
    "tokens",
    "generated",
    "actions",
    "action_logp",
    "turn_rewards",
    "world_hash",
    "finish_reason",
    "reward",
    "reward_parts",
    "success",
    "failure",
    "policy_version",
    "level",
]
KEPT, MOST_BYTES = 20_000, 256 << 20
"""The newest rollouts are in memory: so many, or fewer where they are larger."""
_LOG = logging.getLogger(__name__)


class RolloutFollower:
    """The newest rollouts of a replay folder, oldest first, as ``table`` of ``COLUMNS``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._sizes: dict[Path, int] = {}
        """Rows of each shard that was looked at; 0 of one that is damaged."""
        self._loaded: dict[Path, pa.Table] = {}
        self._pending: dict[Path, tuple[tuple[int, int, int] | None, pa.Table]] = {}
        self.table = _nothing()
        self.total = 0
        """Rollouts stored so far, those included that are not in memory."""

    def poll(self) -> bool:
        """Look for new rollouts; whether there are any."""
        new = self._new_shards()
        for path in reversed(new):  # the newest first: older ones may not fit
            self._look_at(path)
        waiting = [self._look_at_pending(partition) for partition in self._partitions()]
        if new or any(waiting):
            self._assemble()
        return bool(new or any(waiting))

    def _partitions(self) -> list[Path]:
        return sorted(path for path in self._root.glob("run=*") if path.is_dir())

    def _new_shards(self) -> list[Path]:
        found = []
        for path in self._root.glob("run=*/part-*.parquet"):
            with suppress(OSError):
                if path not in self._sizes:
                    found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def _look_at(self, path: Path) -> None:
        try:
            footer = verified(path, None, path.parent.name.removeprefix("run=")).footer
            self._sizes[path] = footer.num_rows
            rows, size = (sum(values) for values in zip((0, 0), *map(_extent, self._loaded.values()), strict=True))
            if rows < KEPT and size < MOST_BYTES:
                with pq.ParquetFile(path, metadata=footer) as file:
                    names = [name for name in COLUMNS if name in footer.schema.to_arrow_schema().names]
                    self._loaded[path] = completed(file.read(names).replace_schema_metadata(None), COLUMNS)
        except (ValueError, OSError, pa.ArrowException) as error:
            self._sizes[path] = 0
            _LOG.warning("%s is not shown: %s", path, error)

    def _look_at_pending(self, partition: Path) -> bool:
        seen = None
        with suppress(OSError):
            found = (partition / PENDING).stat()
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
        if partition in self._pending and self._pending[partition][0] == seen:
            return False
        before = partition in self._pending or seen is not None
        self._pending[partition] = (seen, read_pending(partition, COLUMNS, MOST_BYTES) if seen else _nothing())
        return before

    def _assemble(self) -> None:
        shards = [self._loaded[path] for path in sorted(self._loaded, key=lambda path: path.stat().st_mtime_ns)]
        while len(shards) > 1 and (sum(map(len, shards[1:])) >= KEPT or sum(t.nbytes for t in shards) > MOST_BYTES):
            dropped = shards.pop(0)
            self._loaded = {path: table for path, table in self._loaded.items() if table is not dropped}
        stored = pa.concat_tables([_nothing(), *shards])
        waiting = pa.concat_tables([_nothing(), *(table for _, table in self._pending.values())])
        # Between a shard's name and the end of its pending rows both are there.
        waiting = waiting.filter(pc.invert(pc.is_in(waiting["rollout_id"], stored["rollout_id"].combine_chunks())))
        self.total = sum(self._sizes.values()) + len(waiting)
        self.table = pa.concat_tables([stored, waiting])


def _extent(table: pa.Table) -> tuple[int, int]:
    return len(table), table.nbytes


def _nothing() -> pa.Table:
    return pa.schema([SCHEMA.field(name) for name in COLUMNS]).empty_table()
