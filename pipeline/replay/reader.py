"""Reads rows of the replay buffer in a seeded order, each row on exactly one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.replay.schema import ROW_GROUP, SCHEMA
from pipeline.replay.shards import Quarantined, open_all, open_partition, replay_root

OPEN_FILES = 64  # of one reader: a row group then costs no new look at its file


class ReplayReader:
    """Streams rows of a run's replay buffer, shuffled by seed, each row to exactly one rank.

    ``folder`` is a run folder, its ``replay`` folder or one partition, which alone is read then. Every shard is checked
    against its hash and the schema when the reader opens; what fails is moved to ``_quarantine`` (without
    ``move_damaged``, for those who only look, it stays where it is), logged as a warning, and listed in
    ``quarantined``. Row groups are dealt to ranks, so ranks differ by at most one row group. Shuffling mixes the rows
    of ``window`` row groups drawn from anywhere; at most that many are in memory.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        columns: Sequence[str] | None = None,
        min_reward: float | None = None,
        batch_size: int = ROW_GROUP,
        window: int = 8,
        move_damaged: bool = True,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: ranks count from 0")
        unknown = sorted(set(columns or ()) - set(SCHEMA.names))
        if unknown:
            raise ValueError(f"the replay buffer has no column {', '.join(unknown)}; it has {', '.join(SCHEMA.names)}")
        self.root = replay_root(Path(folder))
        self._seed, self._rank, self._world, self._shuffle = seed, rank, world, shuffle
        self._columns = list(columns) if columns is not None else SCHEMA.names
        self._min_reward, self._batch_size, self._window = min_reward, batch_size, window
        alone = Path(folder).parent == self.root
        opened = open_partition(self.root, Path(folder), move_damaged) if alone else open_all(self.root, move_damaged)
        self.shards, quarantined = opened
        self.quarantined: tuple[Quarantined, ...] = tuple(quarantined)
        self.rows_stored = sum(shard.footer.num_rows for shard in self.shards)
        """Rows of all ranks, before ``min_reward``."""
        self._open = lru_cache(maxsize=OPEN_FILES)(self._open_shard)

    def batches(self, epoch: int = 0, *, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """One pass over this rank's rows in record batches of up to ``batch_size``; ``epoch`` sets another order.

        ``columns``: only these of the reader's.
        """
        columns = self._columns if columns is None else list(columns)
        rng = np.random.default_rng([self._seed, epoch])
        groups = [(number, i) for number, shard in enumerate(self.shards) for i in range(shard.footer.num_row_groups)]
        if self._shuffle:
            groups = [groups[i] for i in rng.permutation(len(groups))]
        mine = groups[self._rank :: self._world]
        # Each rank shuffles with its own stream; the deal above must be the same on all of them.
        rng = np.random.default_rng([self._seed, epoch, self._rank + 1])
        for first in range(0, len(mine), self._window):
            table = pa.concat_tables(
                [self._read(number, i, columns) for number, i in mine[first : first + self._window]]
            )
            if self._shuffle:
                table = _take(table, pa.array(rng.permutation(len(table))))
            yield from (b for b in table.combine_chunks().to_batches(max_chunksize=self._batch_size) if len(b))

    def rows(self, epoch: int = 0) -> Iterator[dict[str, Any]]:
        """The same rows as dicts; token columns are numpy arrays (int32, float32, bool), ``reward_parts`` is a dict."""
        for batch in self.batches(epoch):
            columns = [_python_column(batch.column(i), batch.schema.field(i)) for i in range(batch.num_columns)]
            for values in zip(*columns, strict=True):
                yield dict(zip(self._columns, values, strict=True))

    def _open_shard(self, number: int) -> pq.ParquetFile:
        shard = self.shards[number]
        return pq.ParquetFile(shard.path, metadata=shard.footer, page_checksum_verification=True)

    def _read(self, number: int, group: int, columns: Sequence[str]) -> pa.Table:
        wanted = list(columns) if self._min_reward is None or "reward" in columns else [*columns, "reward"]
        table = completed(
            self._open(number).read_row_group(group, columns=wanted, use_threads=False).replace_schema_metadata(None),
            wanted,
        )
        if self._min_reward is not None:
            table = table.filter(pc.greater_equal(table["reward"], self._min_reward))
        return table.select(columns)


def completed(table: pa.Table, wanted: Sequence[str]) -> pa.Table:
    """``table`` with empty texts and lists for the columns that an older shard lacks."""
    for name in wanted:
        if name not in table.column_names:
            field = SCHEMA.field(name)
            table = table.append_column(
                field, pa.array([[] if pa.types.is_list(field.type) else ""] * len(table), field.type)
            )
    return table.select(wanted)


def _take(table: pa.Table, order: pa.Array) -> pa.Table:
    """``table.take(order)``, with whole token rows copied at once."""
    columns = [column.combine_chunks() for column in table.columns]
    return pa.Table.from_arrays(
        [_take_lists(c, order) if pa.types.is_list(c.type) else c.take(order) for c in columns], schema=table.schema
    )


def _take_lists(column: pa.ListArray, order: pa.Array) -> pa.ListArray:
    """``column.take(order)``, which pyarrow does number by number; seen as byte strings, rows are copied 15 times as
    fast."""
    values = column.values.to_numpy()
    bounds = column.offsets.to_numpy().astype(np.int64) * values.itemsize
    rows = pa.Array.from_buffers(pa.large_binary(), len(column), [None, pa.py_buffer(bounds), pa.py_buffer(values)])
    _, bounds, data = rows.take(order).buffers()
    offsets = np.frombuffer(bounds, np.int64, len(order) + 1) // values.itemsize
    flat = pa.Array.from_buffers(column.type.value_type, offsets[-1], [None, data])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=column.type)


def _python_column(column: pa.Array, field: pa.Field) -> Sequence[Any]:
    if pa.types.is_map(field.type):
        return [dict(pairs) for pairs in column.to_pylist()]
    if pa.types.is_list(field.type):
        offsets = column.offsets.to_numpy()
        values = column.values.to_numpy()
        values = values.view(bool) if values.dtype == np.int8 else values
        return [values[start:stop] for start, stop in pairwise(offsets)]
    return column.to_pylist()
