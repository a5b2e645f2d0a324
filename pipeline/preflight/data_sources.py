"""Checks of the text files, replay folders and tasks that the stages of a config learn from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from configs.checks import offline_sections
from configs.schema import DataSource, RunConfig
from pipeline.runs.errors import first_line
from pipeline.runs.layout import REPLAY

TEXT_SUFFIXES = (".jsonl", ".parquet", ".txt")
SAMPLES = "-samples.jsonl"
"""End of the name of a file that ``latent-control sample`` makes."""


def source_problems(config: RunConfig) -> Iterator[str]:
    """Existing text files and replay folders that are unreadable, empty or of an unknown kind, and tasks that cannot be
    built."""
    from rollout_workers.tasks import build_task

    for name, section in offline_sections(config):
        for index, source in enumerate(section.data):
            if source.task is not None:
                try:
                    build_task(source.task)
                except ValueError as error:
                    missing = str(source.task.options.get("path", ""))
                    made = missing.endswith(SAMPLES) and not Path(missing).exists()
                    yield f"{name}.data[{index}].task: {error}" + (
                        ", made by latent-control sample CONFIG" if made else ""
                    )
            if source.path is not None and Path(source.path).exists():
                problem = _replay_problem(Path(source.path)) if source.kind == "replay" else _text_problem(source)
                if problem:
                    yield f"{name}.data[{index}].path: {problem}"


def _replay_problem(folder: Path) -> str | None:
    shards = [folder, folder / REPLAY] if folder.is_dir() else []
    if any(next(place.rglob("*.parquet"), None) for place in shards if place.is_dir()):
        return None
    return f"{folder} holds no replay shards (*.parquet); give a run folder whose improve stage ran with replay.enabled"


def _text_problem(source: DataSource) -> str | None:
    assert source.path is not None
    path = Path(source.path)
    files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES) if path.is_dir() else [path]
    if not files:
        return f"{path} holds no {', '.join(TEXT_SUFFIXES)} file"
    if files[0].suffix not in TEXT_SUFFIXES:
        return f"{path} is not a {', '.join(TEXT_SUFFIXES)} file"
    empty = next((p for p in files if p.stat().st_size == 0), None)
    if empty is not None:
        return f"{empty} is empty"
    unreadable = next((p for p in files if not os.access(p, os.R_OK)), None)
    return f"{unreadable} is not readable" if unreadable is not None else _column_problem(files[0], source.column)


def _column_problem(path: Path, column: str) -> str | None:
    """A first row without the column."""
    if path.suffix == ".txt":
        return None
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
        try:
            row = json.loads(first)
        except json.JSONDecodeError as error:
            return f"the first line of {path} is not a JSON object: {error}"
        names = list(row) if isinstance(row, dict) else []
    else:
        import pyarrow.parquet

        try:
            names = pyarrow.parquet.read_schema(path).names
        except (OSError, ValueError) as error:
            return f"{path} is not a readable Parquet file: {first_line(error)}"
    return (
        None
        if column in names
        else f"{path} has no column {column!r} (it has {', '.join(map(str, names)) or 'none'}); set column"
    )
