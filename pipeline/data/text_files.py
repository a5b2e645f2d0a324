"""Reads text files (.jsonl, .parquet, .txt) one text at a time."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TEXT_SUFFIXES = (".jsonl", ".parquet", ".txt")
_BLOCK_CHARACTERS = 1_000_000


def text_files(path: Path) -> list[Path]:
    """The text files at ``path``, a file or a folder searched to the bottom, sorted; ``ValueError`` when there is
    none."""
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; set data.path to a {', '.join(TEXT_SUFFIXES)} file or a folder of them"
        )
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = [p for p in files if p.suffix in TEXT_SUFFIXES]
    if not found:
        raise ValueError(f"{path} is or holds no {', '.join(TEXT_SUFFIXES)} file")
    return found


def read_texts(path: Path, column: str) -> Iterator[str]:
    """The texts of one file, in order, a line, a row group or a paragraph in memory at a time.

    ``.jsonl``: the value of ``column`` in each line; ``.parquet``: its rows; ``.txt``: blocks between blank lines.
    ``ValueError`` names file, line or row, and what to do.
    """
    if path.suffix == ".txt":
        return _paragraphs(path)
    return _jsonl_texts(path, column) if path.suffix == ".jsonl" else _parquet_texts(path, column)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that an error names its line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
                ) from error


def _jsonl_texts(path: Path, column: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # JSON can spell halves of characters, which no text has
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error}): {line.strip()[:80]!r}; fix or remove the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, not {line.strip()[:80]!r}; fix or remove the line")
        if column not in row:
            raise ValueError(f"{place}: no key {column!r}; {_hint(column, row)}")
        yield _text(row[column], place, column)


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise ValueError(f"{path}: no column {column!r}; {_hint(column, file.schema_arrow.names)}")
            row = itertools.count()
            for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
                for value in batch.column(0).to_pylist():
                    yield _text(value, f"{path}, row {next(row)}", column)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(
            f"{path}: not a readable Parquet file ({str(error).partition(chr(10))[0]}); write it again or remove it"
        ) from error


def _paragraphs(path: Path) -> Iterator[str]:
    """Blocks between blank lines; one that grows past a million characters is cut there."""
    block: list[str] = []
    size = 0
    for _, line in _lines(path):
        if line.strip():
            block.append(line)
            size += len(line)
        if block and (not line.strip() or size > _BLOCK_CHARACTERS):
            yield "".join(block).strip()
            block, size = [], 0
    if block:
        yield "".join(block).strip()


def _text(value: object, place: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: {column!r} is {value!r:.60} ({type(value).__name__}), not a text; fix or remove the row"
        )
    return value


def _hint(column: str, names: Sequence[str] | dict[str, object]) -> str:
    near = difflib.get_close_matches(column, list(names), n=1)
    there = f"it has {', '.join(map(repr, names)) or 'none'}"
    return f"did you mean column: {near[0]}? ({there})" if near else f"{there}; set column to one of them"
