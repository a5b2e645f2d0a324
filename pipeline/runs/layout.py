"""Names of the files and folders of a run; no other module writes one of them as a literal."""

from __future__ import annotations

CONFIG = "config.yaml"
"""The resolved config, all defaults filled in."""
SUMMARY = "summary.json"
"""Seconds, checkpoint and last metrics of each finished stage, then the evaluation and the verdicts of the gates."""
MANIFEST = "manifest.json"
"""Hashes of the run's files (``pipeline.runs.manifest``)."""
METRICS = "metrics.jsonl"
"""One checksummed line per logged step (``pipeline.runs.metrics_log``)."""
EVENTS = "events.jsonl"
"""One checksummed line per event (``pipeline.runs.events``)."""
ENVIRONMENT = "environment.json"
PROCESS = "process.json"
"""Host and identity of the process, while one works on the run."""
LOCK, MANIFEST_LOCK = ".lock", ".manifest.lock"
"""Locked while a process works on the run, and while one changes the manifest."""
STALL = "stall.txt"
"""Stacks of all threads, written by the watchdog."""
CONTROL = "control.json"
"""``{"rollout_workers": 3}``, written by ``latent-control scale``, read between updates; ``null`` leaves the number to
autoscaling."""
MLFLOW = "mlflow.json"
"""Tracking URI, experiment and MLflow run of each stage."""
EVALUATION, OUTCOMES = "evaluation.json", "evaluation.parquet"
"""Measures of each variant; every judged response (``pipeline.evaluation.outcomes``)."""
EXPLORER, REPORT = "explorer.html", "report.html"

CHECKPOINTS, STAGE_RECORDS = "checkpoints", "stages"
REPLAY, LEDGER = "replay", "ledger"
QUARANTINE = "quarantine"
"""The rollouts of skipped updates, in the replay buffer's form."""
OFF_POLICY, COMPARE = "off_policy", "compare"
RAY_TRAIN = "ray_train"
"""Ray Train's own files, of stages with several workers."""
BROUGHT = "brought"
"""Copies of the files that came along with a job: the unpacked job is deleted when it ends."""

TOKEN_POLICY, TOKEN_INFO = "token_policy.safetensors", "token_policy.json"
"""Files of a checkpoint of a token-level policy."""


def stage_record(stage: str) -> str:
    """Name, within the run folder, of the record of a finished stage: ``stages/improve.json``."""
    return f"{STAGE_RECORDS}/{stage}.json"
