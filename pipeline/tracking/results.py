"""Keeps results computed after a run: as JSON in its folder, and in MLflow if the run is tracked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from configs.redaction import without_secrets
from configs.schema import Tracking
from pipeline.runs import manifest
from pipeline.storage.atomic import write_atomic
from pipeline.tracking.mlflow_store import quiet_mlflow
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.uris import read_record, tracking_uri


def keep(
    result: Mapping[str, Any],
    run_dir: Path,
    settings: Tracking,
    *,
    folder: str,
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    tags: Mapping[str, str] = MappingProxyType({}),
    files: Sequence[Path] = (),
) -> Path:
    """Write ``run_dir/<folder>/<name>-<n>.json``; when the run is tracked also to the MLflow run ``<folder>_<name>``,
    each as a step.

    Args:
        files: more artifacts of that run.
    """
    place = run_dir / folder
    place.mkdir(exist_ok=True)
    number = len(list(place.glob(f"{name}-*.json"))) + 1
    path = place / f"{name}-{number}.json"
    write_atomic(path, json.dumps(result, indent=1).encode())
    manifest.know_own(run_dir, path)
    tracker = Tracker(settings, run_dir, group=run_dir.name)
    tracker.start(f"{folder}_{name}", params=params, tags={"algorithm": folder} | dict(tags))
    tracker.log(metrics, number)
    for file in (path, *files):
        tracker.artifact(file, folder)
    tracker.finish("FINISHED")
    tracker.close()
    return path


def attach(path: Path, settings: Tracking, run_dir: Path, stage: str) -> str:
    """Store a copy of a file with a stage's run that is over (with the latest one, where there is none of that stage).

    Returns:
        "", or why it was not stored.
    """
    record = read_record(run_dir)
    if not settings.enabled or record is None:
        return "the run was not tracked"
    run_id = record["runs"].get(stage) or next(reversed(record["runs"].values()), None)
    uri = tracking_uri(settings.uri, run_dir)
    if run_id is None or (uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file()):
        return f"there is no such run in {without_secrets(uri)}"
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri=uri)
        client.log_artifact(run_id, str(path))
    except (MlflowException, OSError, SQLAlchemyError) as error:
        return f"the store did not take it: {without_secrets(str(error)).strip().partition(chr(10))[0][:200]}"
    return ""
