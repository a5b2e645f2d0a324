"""What a file of rows may cost: a few kilobytes can say gigabytes (compression, runs of one value, a line without end).

One row is bounded by ``LONGEST``, a document that is read whole by ``LARGEST``, a Parquet row group by ``MOST_VALUES``,
all that a task holds by ``task.options.max_gib``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

LONGEST = 1 << 27
"""Bytes of a line, or of a field of a CSV file."""
LARGEST = 1 << 30
"""Bytes of a JSON document, and of a Parquet file within a .gz one."""
MOST_VALUES = 1 << 27
"""Of a JSON document, and of a column in a row group."""
BATCH_ROWS, BATCH_BYTES = 256, 1 << 29
MAX_GIB = 8.0
_ROW_BYTES = 1024
"""What a task keeps beside a row."""


def require_whole(line: bytes, place: str) -> None:
    """``ValueError`` where a line, of which up to ``LONGEST + 1`` bytes were read, has more than may be."""
    if len(line) > LONGEST:
        raise ValueError(
            f"{place}: longer than {LONGEST >> 20} MiB, the most that a line may have; write one row a line, or remove "
            f"it: {line[:60]!r}"
        )


def whole_document(path: object, lines: Iterable[str]) -> str:
    """The text of a document that is parsed as one."""
    parts: list[str] = []
    size = values = 0
    for line in lines:
        size, values = size + len(line), values + line.count(",")
        if size > LARGEST or values > MOST_VALUES:
            raise ValueError(
                f"{path}: one JSON document of more than {LARGEST >> 20} MiB or {MOST_VALUES:,} values; write one "
                "object a line (.jsonl)"
            )
        parts.append(line)
    return "".join(parts)


def batch_rows(path: object, footer: Any) -> int:
    """Rows of a Parquet file to read at a time, so that they fit even where each has a column's longest value."""
    largest = 1
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        for column in (group.column(place) for place in range(group.num_columns)):
            if column.num_values > MOST_VALUES:
                raise ValueError(
                    f"{path}: row group {number} has {column.num_values:,} values in {column.path_in_schema}, more "
                    f"than {MOST_VALUES:,}; write smaller row groups (row_group_size=1000), or leave that column out"
                )
            if column.physical_type == "BYTE_ARRAY":
                largest = max(largest, column.total_uncompressed_size)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // largest))


def bounded_rows(rows: Iterable[tuple[str, dict[str, object]]], gib: float) -> Iterator[tuple[str, dict[str, object]]]:
    """(place, row) of rows that a task keeps, as long as all of them together take less than ``gib`` GiB."""
    room = gib * 2**30
    for count, (place, row) in enumerate(rows, 1):
        room -= _ROW_BYTES + _bytes_of(row)
        if room < 0:
            raise ValueError(
                f"{place}: {count:,} rows up to here take more than task.options.max_gib = {gib:g} GiB of memory in "
                "each process; raise it, or leave rows out"
            )
        yield place, row


def _bytes_of(value: object) -> int:
    """Of a value and all that is in it."""
    total, rest = 0, [value]
    while rest:
        one = rest.pop()
        total += sys.getsizeof(one)
        if isinstance(one, dict):
            rest += one.values()
        elif isinstance(one, list | tuple):
            rest += one
    return total
