"""Provenance in every checkpoint's manifest: config, commit, random state, MLflow run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.redaction import without_secrets
from configs.schema import RunConfig
from pipeline.runs.environment import git_commit
from pipeline.tracking.uris import read_record


def circumstances(config: RunConfig, run_dir: Path, stage: str, update: int) -> dict[str, Any]:
    """``{"config": {...}, "git_commit": "...", "random": {"seed": 0, "version": 50}, "mlflow_run": "..."}``. All
    randomness follows from the seed, the update (the policy's version) and the place in the stream of prompts, so these
    are the random states."""
    return {
        # Manifests are stored with the MLflow run, which others may read.
        "config": json.loads(without_secrets(config.model_dump_json())),
        "git_commit": git_commit(),
        "random": {"seed": config.seed, "version": update},
        "mlflow_run": ((read_record(run_dir) or {}).get("runs") or {}).get(stage, ""),
    }
