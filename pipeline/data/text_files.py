"""Reads text files (.txt, or files of rows with the text in one column) one text at a time."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from rollout_workers.tasks.row_files import SUFFIXES, Row, lines, read_file, suffix

TEXT_SUFFIXES = (*SUFFIXES, ".txt")
_BLOCK_CHARACTERS = 1_000_000


def text_files(path: Path) -> list[Path]:
    """The text files at ``path``, a file or a folder searched to the bottom, sorted; ``ValueError`` when there is
    none."""
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; set data.path to a {', '.join(TEXT_SUFFIXES)} file or a folder of them"
        )
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = [p for p in files if suffix(p) in TEXT_SUFFIXES]
    if not found:
        raise ValueError(f"{path} is or holds no {', '.join(TEXT_SUFFIXES)} file")
    return found


def read_texts(path: Path, column: str) -> Iterator[str]:
    """The texts of one file, in order, a line, a row group or a paragraph in memory at a time.

    ``.txt``: blocks between blank lines; files of rows (``row_files.read_file``): the value of ``column`` in each.
    ``ValueError`` names file, line or row, and what to do.
    """
    if suffix(path) == ".txt":
        return _paragraphs(path)
    return (_text(row, place, column) for place, row in read_file(path, [column]))


def _paragraphs(path: Path) -> Iterator[str]:
    """Blocks between blank lines; one that grows past a million characters is cut there."""
    block: list[str] = []
    size = 0
    for _, line in lines(path):
        if line.strip():
            block.append(line)
            size += len(line)
        if block and (not line.strip() or size > _BLOCK_CHARACTERS):
            yield "".join(block).strip()
            block, size = [], 0
    if block:
        yield "".join(block).strip()


def _text(row: Row, place: str, column: str) -> str:
    if column not in row:
        near = difflib.get_close_matches(column, list(row), n=1)
        there = f"it has {', '.join(map(repr, row)) or 'none'}"
        hint = f"did you mean column: {near[0]}? ({there})" if near else f"{there}; set column to one of them"
        raise ValueError(f"{place}: no key {column!r}; {hint}")
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: {column!r} is {value!r:.60} ({type(value).__name__}), not a text; fix or remove the row"
        )
    return value
