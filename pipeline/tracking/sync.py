"""``latent-control sync RUN``: sends to MLflow what it lacks of ``metrics.jsonl``, after the store was away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from configs.loading import load_config
from configs.redaction import without_secrets
from pipeline.runs import manifest, status
from pipeline.runs.events import Events, read_events
from pipeline.runs.layout import CHECKPOINTS, CONFIG, EVALUATION, MANIFEST, METRICS, SUMMARY, stage_record
from pipeline.runs.metrics_log import records
from pipeline.runs.stage_table import EVALUATE
from pipeline.runs.summary import read_summary
from pipeline.tracking.lineage import result_tags
from pipeline.tracking.stage_record import stage_tags, traces_of
from pipeline.tracking.tracker import Status, Tracker

PATIENCE = 600.0
"""Seconds to wait for the store to take it all."""
_RESERVED = ("stage", "step", "time")


def sync(run_dir: Path, say: Callable[[str], None]) -> bool:
    """Send the steps that the store lacks, each once, and each stage's status; whether all was stored.

    Raises:
        ValueError: the run is not tracked, or is still running.
    """
    config = load_config(run_dir / CONFIG, check_paths=False)
    if not config.tracking.enabled:
        raise ValueError(f"{run_dir} is not tracked: tracking.enabled is false in its config")
    if status.overview(run_dir).status == "running":
        raise ValueError(f"{run_dir} is running and sends its metrics itself")
    tracker = Tracker(config.tracking, run_dir, group=run_dir.name)
    logged = records(run_dir / METRICS)
    for stage in dict.fromkeys(str(record["stage"]) for record in logged):
        tracker.start(
            stage, params=config.model_dump(mode="json"), tags=stage_tags(config, run_dir, stage), patience=PATIENCE
        )
        mine = [record for record in logged if record["stage"] == stage]
        for record in mine:
            values = {
                name: float("nan") if v is None else float(v) for name, v in record.items() if name not in _RESERVED
            }
            tracker.log(values, int(record["step"]), when=float(record["time"]))
        result = run_dir / CHECKPOINTS / stage
        if (result / MANIFEST).is_file():
            tracker.artifact(result / MANIFEST, "checkpoint")
            tracker.tag(result_tags(run_dir, result, None))
        sent = tracker.finish(_status(run_dir, stage), patience=PATIENCE, traces=traces_of(config, run_dir, stage))
        tracker.settle(PATIENCE)
        say(f"{stage}: {len(mine)} steps {'are in' if sent else 'are not all in'} {without_secrets(tracker.uri)}")
        if not sent:
            return False
    tracker.close()
    if (summary := read_summary(run_dir)).pop("tracking", ""):
        manifest.put_json(run_dir, SUMMARY, summary)
        Events(run_dir).note("tracking_synced", f"{without_secrets(tracker.uri)} has what it lacked")
    return True


def _status(run_dir: Path, stage: str) -> Status:
    done = run_dir / (EVALUATION if stage == EVALUATE else stage_record(stage))
    if done.is_file():
        return "FINISHED"
    ends = [event["kind"] for event in read_events(run_dir) if event["kind"] in ("stopped", "failed")]
    return "FAILED" if ends[-1:] == ["failed"] else "KILLED"
