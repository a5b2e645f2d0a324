"""Whether the MLflow store has the numbers of ``metrics.jsonl`` and the run's settings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.redaction import without_secrets
from configs.schema import RunConfig
from pipeline.rl import ledger
from pipeline.runs.events import read_events
from pipeline.runs.layout import CONFIG, METRICS
from pipeline.runs.metrics_log import records
from pipeline.runs.repair import by_parts
from pipeline.runs.stage_table import EVALUATE, ONLINE, STAGES
from pipeline.runs.summary import read_summary
from pipeline.tracking.mlflow_store import as_params, stored, valid_key
from pipeline.tracking.uris import flatten, read_record, tracking_uri

STAGE_NAMES = {EVALUATE, *(stage.name for stage in STAGES)}
"""Stages whose MLflow run has the config as its parameters."""


def disagreements(run_dir: Path, config: RunConfig) -> tuple[list[str], str]:
    """(what differs, a line each; what was compared, "" where nothing could be).

    Steps that a restart did again are left out: the store keeps what it was sent first.
    """
    record = read_record(run_dir)
    uri = "" if record is None else tracking_uri(config.tracking.uri, run_dir)
    if record is None or (uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file()):
        return [], ""
    compared, problems = 0, list[str]()
    kinds = [event["kind"] for event in read_events(run_dir)]
    # A kill takes what was not sent yet; the summary says what a store that was away was never sent.
    once = kinds.count("started") == 1 and "finished" in kinds
    sent = once and not read_summary(run_dir).get("tracking")
    # A resumed run's may have changed.
    settings = _settings(as_params(flatten(config.model_dump(mode="json")))) if once else {}
    for stage, run_id in record["runs"].items():
        logged = _logged(run_dir, stage)
        found = stored(uri, run_id)
        if found is None:
            return problems, ""
        if found.deleted:
            problems.append(f"MLflow has the run of {stage} among the deleted: restore {run_id} there")
        params = _settings(found.params) if stage in STAGE_NAMES else {}
        problems += [
            f"{stage}: {key} is {params[key]} in MLflow, {settings[key]} in {CONFIG}"
            for key in sorted(settings.keys() & params.keys())
            if params[key] != settings[key]
        ]
        there = {(key, step) for key, step, _ in found.metrics}
        lost = sorted(place for place, value in logged.items() if math.isfinite(value) and place not in there)
        if lost and sent:
            problems.append(f"MLflow lacks {len(lost)} numbers of {stage}, the first {lost[0][0]} at {lost[0][1]}")
        both = [(key, step, value, logged[key, step]) for key, step, value in found.metrics if (key, step) in logged]
        compared += len(both)
        problems += [
            f"{stage} {step}: {key} is {value:g} in MLflow, {said:g} in {METRICS}"
            for key, step, value, said in both
            if not _same(said, value)
        ]
    return problems, f"{compared} numbers agree with {without_secrets(uri)}" if compared else ""


def _logged(run_dir: Path, stage: str) -> dict[tuple[str, int], float]:
    """The metrics of the steps that were done once, by MLflow's key and step."""
    last = math.inf
    if sum(event["kind"] == "started" for event in read_events(run_dir)) > 1:
        starts = ledger.read(run_dir, stage).starts if stage in ONLINE else ()
        last = min((int(start.get("version", 0)) for start in starts[1:]), default=math.inf if starts else 0)
    found: dict[tuple[str, int], float] = {}
    for record in records(run_dir / METRICS):
        if record.get("stage") == stage and record["step"] <= last:
            found |= {(valid_key(name), record["step"]): value for name, value in _numbers(record)}
    return found


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name not in ("stage", "step", "time") and (value is None or isinstance(value, int | float)):
            yield name, math.nan if value is None else float(value)


def _settings(params: Mapping[str, str]) -> dict[str, Any]:
    """MLflow's parameters by dotted name, lists by their parts."""
    found: dict[str, Any] = {}
    for key, text in params.items():
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        found |= by_parts(value, key)
    return found


def _same(logged: float, stored: float) -> bool:
    # Not finite is null in metrics.jsonl; MLflow's databases hold the largest number in place of an infinite one.
    return not math.isfinite(logged) or math.isclose(logged, stored, rel_tol=1e-9, abs_tol=1e-12)
