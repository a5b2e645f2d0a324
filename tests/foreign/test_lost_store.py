"""A run that lost its tracking store says what the store lacks, and how to send it."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.loading import dump_config, load_config
from configs.schema import RunConfig, Tracking
from pipeline.cli.output import closing_words
from pipeline.console.displays import Display
from pipeline.integrity.diagnose import diagnose
from pipeline.run import note_lost
from pipeline.runs.events import Events
from pipeline.runs.metrics_log import RunLog
from pipeline.runs.summary import read_summary
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.uris import read_record

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    return folder


def config_of(run: Path, uri: str | None = None) -> RunConfig:
    config = load_config(QUICKSTART)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    (run / "config.yaml").write_text(dump_config(config))
    return config


def logged(run: Path, settings: Tracking) -> tuple[Tracker, RunLog]:
    """A stage that logs three steps."""
    tracker = Tracker(settings, run, group=run.name)
    log = RunLog(run, tracker=tracker, display=Display())
    tracker.start("clone", {}, {}, patience=30)
    for step in (1, 2, 3):
        log.log("clone", step, {"loss": 1.0 / step})
    tracker.finish("FINISHED", patience=30)
    return tracker, log


def test_a_store_that_has_all_is_not_mentioned(run: Path) -> None:
    tracker, log = logged(run, config_of(run).tracking)
    note_lost(log, run, tracker.lost())
    assert tracker.lost() == "" and not (run / "summary.json").exists()


def test_a_deleted_database_is_said_and_synced(run: Path) -> None:
    """Whoever has it open writes on without an error."""
    tracker, log = logged(run, config_of(run).tracking)
    Events(run).note("started", "started")
    (run.parent / "mlflow.db").unlink()
    note_lost(log, run, tracker.lost())
    Events(run).note("finished", "all stages are done")
    tracker.close()
    remedy = f"latent-control sync {run}"
    assert remedy in read_summary(run)["tracking"] and "deleted" in read_summary(run)["tracking"]
    assert remedy in closing_words(run)
    found = diagnose(run)
    assert "nothing went wrong" not in found.cause and found.next == remedy
    # Another process, as the user's: this one's MLflow still has the deleted file open.
    subprocess.run([sys.executable, "-m", "pipeline", "sync", str(run)], cwd=ROOT, check=True, timeout=300)
    run_id = (read_record(run) or {})["runs"]["clone"]
    with sqlite3.connect(run.parent / "mlflow.db") as store:
        stored = store.execute("select key, step, value from metrics where run_uuid = ?", [run_id]).fetchall()
    assert sorted(stored) == [("loss", 1, 1.0), ("loss", 2, 0.5), ("loss", 3, 1.0 / 3)]
    assert "tracking" not in read_summary(run) and "sync" not in closing_words(run)
    assert diagnose(run).next == f"latent-control audit {run}"


def test_a_server_that_never_answers_is_said_with_what_waits(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as nobody:  # bound, but not listening
        nobody.bind(("127.0.0.1", 0))
        uri = f"http://someone:hidden-word@127.0.0.1:{nobody.getsockname()[1]}"
        tracker = Tracker(config_of(run, uri).tracking, run, group="first")
        log = RunLog(run, tracker=tracker, display=Display())
        tracker.start("clone", {}, {}, patience=1)
        for step in (1, 2, 3):
            log.log("clone", step, {"loss": 1.0})
        tracker.finish("FINISHED", patience=1)
        note_lost(log, run, tracker.lost())
    said = read_summary(run)["tracking"]
    assert "records wait" in said and f"latent-control sync {run}" in said and "hidden-word" not in said
    assert "hidden-word" not in (run / "events.jsonl").read_text()
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert "tracking_lost" in kinds


def test_what_a_store_refuses_is_said_with_its_reason(run: Path) -> None:
    tracker, log = logged(run, config_of(run).tracking)
    tracker.start("improve", {}, {}, patience=30)
    tracker.artifact(run / "nothing-here.json")
    tracker.finish("FINISHED", patience=30)
    deadline = time.monotonic() + 10
    while not tracker.lost() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "it refused 1" in tracker.lost() and "nothing-here.json" in tracker.lost()
    log.close()
