"""Rollouts that wait in memory for their shard, shown to other processes in a hidden file beside the shards.

``.pending.arrow`` is an Arrow IPC stream, one batch per ``show``; ``clear`` removes it once the rows are in a shard. It
is for looking at a run while it works: nothing is restored from it, a full disk stops nothing, and a torn last batch is
left out.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from pipeline.replay.schema import SCHEMA

PENDING = ".pending.arrow"


class Pending:
    """Writes the file of one partition."""

    def __init__(self, partition: Path) -> None:
        self._path = partition / PENDING
        self._file: pa.OSFile | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None
        self.clear()  # the one of a process that was killed

    def show(self, table: pa.Table) -> None:
        """Append rows of ``SCHEMA``."""
        try:
            if self._writer is None:
                self._file = pa.OSFile(str(self._path), "wb")
                self._writer = pa.ipc.new_stream(self._file, SCHEMA)
            self._writer.write_table(table)
        except OSError:
            self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        for part in (self._writer, self._file):
            with suppress(OSError):
                if part is not None:
                    part.close()
        self._writer = self._file = None
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def read_pending(partition: Path, columns: list[str], most_bytes: int) -> pa.Table:
    """The rows that are whole; none where there is no file, or one above ``most_bytes`` or of another form."""
    batches: list[pa.RecordBatch] = []
    path = partition / PENDING
    # Torn, or gone meanwhile: what was read until then is whole.
    with suppress(OSError, pa.ArrowException):
        if path.stat().st_size <= most_bytes:
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream if stream.schema.equals(SCHEMA) else ():
                    batch.validate(full=True)
                    batches.append(batch.select(columns))
    return pa.Table.from_batches(batches, schema=pa.schema([SCHEMA.field(name) for name in columns]))
