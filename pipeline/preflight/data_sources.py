"""Checks of the text files, replay folders and tasks that the stages of a config learn from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from configs.checks import offline_sections
from configs.schema import DataSource, RunConfig
from pipeline.runs.errors import first_line
from pipeline.runs.layout import REPLAY

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
    """Every file must be readable, and its first text be there."""
    from pipeline.data.text_files import read_texts, text_files

    assert source.path is not None
    try:
        for path in text_files(Path(source.path)):
            if next(iter(read_texts(path, source.column)), None) is None:
                return f"{path} is empty"
    except (OSError, ValueError) as error:
        return first_line(error)
    return None
