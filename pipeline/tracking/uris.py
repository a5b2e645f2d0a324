"""Addresses of tracking stores, and the record of a run folder's MLflow runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.redaction import HIDDEN, without_secrets
from pipeline.runs.layout import MLFLOW


def tracking_uri(uri: str | None, run_dir: Path) -> str:
    """The store of a run: ``uri`` with a sqlite path made absolute; by default ``mlflow.db`` beside the run folders.

    Raises:
        ValueError: the secrets were taken out of ``uri``.
    """
    if uri is None:
        return f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    if HIDDEN in uri:
        raise ValueError(f"tracking.uri is {uri}, a copy without its secrets: write them again in place of {HIDDEN}")
    if uri.startswith("sqlite:///"):
        # MLflow would take a relative one from the working folder, which in a Ray job is a temporary one.
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


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
