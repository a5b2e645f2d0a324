"""Checks of the text files, replay folders and tasks that the stages of a config learn from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from configs.checks import offline_sections
from configs.schema import DataSource, RunConfig, TaskConfig
from pipeline.runs.errors import first_line
from pipeline.runs.layout import REPLAY

if TYPE_CHECKING:
    from rollout_workers.tasks import Task

SAMPLES = "-samples.jsonl"
"""End of the name of a file that ``latent-control sample`` makes."""


class Builder:
    """Builds tasks, those of equal settings once: ``build = Builder(); task = build(config.task)``."""

    def __init__(self) -> None:
        self._built: dict[str, Task | ValueError] = {}

    def __call__(self, settings: TaskConfig) -> Task:
        """The task; ``ValueError`` where it cannot be built."""
        from rollout_workers.tasks import build_task

        key = settings.model_dump_json()
        if key not in self._built:
            try:
                self._built[key] = build_task(settings)
            except ValueError as error:
                self._built[key] = error
        found = self._built[key]
        if isinstance(found, ValueError):
            raise found
        return found


def source_problems(config: RunConfig, build: Builder) -> Iterator[str]:
    """Existing text files and replay folders that are unreadable, empty or of an unknown kind, and tasks that cannot be
    built."""
    for name, section in offline_sections(config):
        for index, source in enumerate(section.data):
            if source.task is not None:  # the run's own is checked as such
                yield from _task_problems(source.task, f"{name}.data[{index}].task", build)
            if source.path is not None and Path(source.path).exists():
                problem = _replay_problem(Path(source.path)) if source.kind == "replay" else _text_problem(source)
                if problem:
                    yield f"{name}.data[{index}].path: {problem}"


def _task_problems(settings: TaskConfig, place: str, build: Builder) -> Iterator[str]:
    """That it cannot be built."""
    try:
        build(settings)
    except ValueError as error:
        missing, said = str(settings.options.get("path", "")), str(error).replace("task.options", f"{place}.options")
        made = missing.endswith(SAMPLES) and not Path(missing).exists()
        yield f"{place}.options.path: {said}, made by latent-control sample CONFIG" if made else f"{place}: {said}"


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
