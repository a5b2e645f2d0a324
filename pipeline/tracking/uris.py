"""Addresses of tracking stores, and the record of a run folder's MLflow runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.redaction import HIDDEN, without_secrets
from configs.schema import Tracking
from pipeline.runs.layout import MLFLOW

URI, EXPERIMENT = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
"""Variables of MLflow's that hold where the config names no store and no experiment."""
DEFAULT: str = Tracking.model_fields["experiment"].default


def tracking_uri(uri: str | None, run_dir: Path) -> str:
    """The store of a run: ``uri`` with a sqlite path made absolute; without it the server that the run's stages are on
    already, else what ``MLFLOW_TRACKING_URI`` says, else ``mlflow.db`` beside the run folders.

    Raises:
        ValueError: the secrets were taken out of ``uri``.
    """
    if uri is not None and HIDDEN in uri:
        raise ValueError(f"tracking.uri is {uri}, a copy without its secrets: write them again in place of {HIDDEN}")
    beside, named = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}", os.environ.get(URI)
    if uri is None:
        known = str((read_record(run_dir) or {}).get("tracking_uri") or "")
        if known.startswith("sqlite:///"):
            return beside  # also after the folder was moved
        uri = known if known and HIDDEN not in known else named or beside
    if uri.startswith("sqlite:///"):
        # MLflow would take a relative one from the working folder, which in a Ray job is a temporary one.
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def experiment_of(settings: Tracking) -> str:
    """The experiment's name: the config's; where that is the default, what ``MLFLOW_EXPERIMENT_NAME`` says."""
    return settings.experiment if settings.experiment != DEFAULT else os.environ.get(EXPERIMENT) or DEFAULT


def heeded(settings: Tracking) -> list[str]:
    """What the environment says about tracking, and whether it holds."""
    said = []
    for name, key, own, default in (
        (URI, "tracking.uri", settings.uri, None),
        (EXPERIMENT, "tracking.experiment", settings.experiment, DEFAULT),
    ):
        if (value := os.environ.get(name)) and settings.enabled and value != own:
            holds = f"holds, as the config has no {key}" if own == default else f"does not hold: {key} is {own}"
            said.append(without_secrets(f"{name}={value} {holds}"))
    return said


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """``{"tracking_uri", "experiment_id", "runs": {stage: run id}}`` of a run folder; ``None`` when it was not
    tracked."""
    try:
        record = json.loads((run_dir / MLFLOW).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("runs"), dict) else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"improve": {"updates": 3}}`` -> ``{"improve.updates": "3"}``; lists and empty sections as JSON, without
    secrets."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[f"{prefix}{key}"] = without_secrets(text)
    return flat
