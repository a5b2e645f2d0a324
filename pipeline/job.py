"""The driver's side of a run inside a Ray job."""

from __future__ import annotations

import json
import os
from pathlib import Path

from configs.loading import load_config
from configs.paths import path_fields
from configs.schema import RunConfig
from pipeline.cluster.connect import connected
from pipeline.cluster.shared_storage import require_shared_storage
from pipeline.console.displays import Display
from pipeline.preflight.number_type import with_types_of
from pipeline.run import resume, run
from pipeline.runs.folder_name import name_problem
from pipeline.runs.layout import BROUGHT, CONFIG, LOCK
from pipeline.storage.atomic import copy


def run_job(config: RunConfig, run_dir: Path, display: Display | None = None) -> Path:
    """Check the storage on all nodes, then run; a run of the same config that ``run_dir`` holds already is continued.

    Raises:
        ValueError: with every problem of the storage, or the folder holds something else.
    """
    if problem := name_problem(run_dir, config):
        raise ValueError(problem)
    with connected(config):
        config = with_files_brought(config, run_dir)
        require_shared_storage(config, run_dir)
        if not (run_dir / CONFIG).is_file():
            if names := sorted(path.name for path in run_dir.iterdir() if path.name not in (BROUGHT, LOCK)):
                raise ValueError(
                    f"{run_dir} is not a run folder, but not empty ({', '.join(names[:3])}); give another folder"
                )
            return run(config, run_dir, display)
        stored = load_config(run_dir / CONFIG, check_paths=False)
        if with_types_of(config, stored) != stored:
            raise ValueError(f"{run_dir} holds a run of another config ({CONFIG} differs); give another folder")
        return resume(run_dir, display)


def with_files_brought(config: RunConfig, run_dir: Path) -> RunConfig:
    """The config with copies in the run folder in place of what lies in the job's own folder."""
    data, here = config.model_dump(mode="json"), Path.cwd().resolve()
    for _, value, put in path_fields(data):
        path = Path(value)
        if path.is_absolute() and path.exists() and path.is_relative_to(here) and not run_dir.is_relative_to(here):
            put(str(_copied(path, run_dir / BROUGHT / path.name)))
    return RunConfig.model_validate_json(json.dumps(data), strict=True)


def _copied(path: Path, to: Path) -> Path:
    if not to.exists():
        part = to.with_name(f".{to.name}-{os.getpid()}")
        copy(path, part)
        os.replace(part, to)
    return to
