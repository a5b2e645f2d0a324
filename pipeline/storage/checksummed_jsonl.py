"""Reads and writes JSON lines, each with its own checksum: torn or changed lines are detected and left out."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_CHECK = ', "crc32": "'

Record = Mapping[str, Any]


def line(record: Record, default: Callable[[Any], Any] | None = None) -> str:
    """A JSON line with its checksum as the last key."""
    body = json.dumps(record, default=default)
    return f'{body[:-1]}{_CHECK}{zlib.crc32(body.encode()):08x}"}}\n'


def parsed(data: bytes, *, unchecked: Callable[[Record], bool]) -> Record | None:
    """The record of a complete, unchanged line, else ``None``; ``unchecked`` decides on a line without a checksum."""
    try:
        record = json.loads(data)
        text = data.decode()
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not data.endswith(b"\n"):
        return None
    check = record.pop("crc32", None)
    if check is None:
        return record if unchecked(record) else None
    body = text.rpartition(_CHECK)[0] + "}"
    return record if check == f"{zlib.crc32(body.encode()):08x}" else None


def read(path: Path) -> tuple[list[Record], list[bytes]]:
    """(the records of a file, its damaged lines). A file without any checksum is of an older version and
    accepted as it is."""
    data = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    old = not any(_CHECK.encode() in one for one in data)
    pairs = [(one, parsed(one, unchecked=lambda _: old)) for one in data if one.strip()]
    return [record for _, record in pairs if record is not None], [one for one, record in pairs if record is None]
