"""Addresses of tracking stores, and the record of a run folder's MLflow runs; passwords are left out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pipeline.runs.layout import MLFLOW

_SECRET = re.compile(r"([^&=]*(?:password|passwd|token|secret|key)[^&=]*=)[^&]*", re.IGNORECASE)


def tracking_uri(uri: str | None, run_dir: Path) -> str:
    """The store of a run: ``uri`` with a sqlite path made absolute; by default ``mlflow.db`` beside the run folders."""
    if uri is None:
        return f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        # MLflow would take a relative one from the working folder, which in a Ray job is a temporary one.
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def without_password(uri: str) -> str:
    """The URI without secrets: no password, no token in place of a user, no secret parameter."""
    parts = urlsplit(uri)
    if parts.password is not None:
        parts = parts._replace(netloc=f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}")
    elif parts.username and parts.scheme in ("http", "https"):
        parts = parts._replace(netloc=f"***@{parts.netloc.rpartition('@')[2]}")
    query = _SECRET.sub(r"\1***", parts.query)
    return uri if (parts, query) == (urlsplit(uri), parts.query) else urlunsplit(parts._replace(query=query))


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """``{"tracking_uri", "experiment_id", "runs": {stage: run id}}`` of a run folder; ``None`` when it was not
    tracked."""
    try:
        record = json.loads((run_dir / MLFLOW).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("runs"), dict) else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"improve": {"updates": 3}}`` -> ``{"improve.updates": "3"}``; lists and empty sections as JSON, no passwords
    of URIs."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[f"{prefix}{key}"] = without_password(text) if "://" in text else text
    return flat
