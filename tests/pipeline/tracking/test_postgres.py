"""Tracking straight into PostgreSQL. Skipped where Debian's ``postgresql`` or ``psycopg2-binary`` is not installed
(docs/cluster.md)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from configs.schema import Tracking
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.uris import read_record

BIN = max((path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)
pytestmark = [
    pytest.mark.skipif(
        BIN is None or os.name == "nt", reason="PostgreSQL is not installed: apt-get install postgresql"
    ),
    pytest.mark.skipif(
        find_spec("psycopg") is None, reason="the driver is not installed: pip install 'psycopg[binary]'"
    ),
]


@pytest.fixture
def database() -> Iterator[str]:
    """The URI of a database in a server of its own, behind a socket in a folder: no port is taken."""
    assert BIN is not None
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as name:
        folder, data = Path(name), Path(name) / "data"
        # The server refuses to run as root, which containers are.
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        if user:
            shutil.chown(folder, "postgres", "postgres")

        def call(*command: str) -> None:
            subprocess.run([*user, *command], check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=60)

        call(str(BIN / "initdb"), "-D", str(data), "-U", "mlflow", "-A", "trust", "-N")
        call(
            str(BIN / "pg_ctl"),
            "-D",
            str(data),
            "-w",
            "-l",
            str(folder / "log"),
            "-o",
            f"-k {folder} -h '' -F",
            "start",
        )
        try:
            call(str(BIN / "createdb"), "-h", str(folder), "-U", "mlflow", "mlflow")
            yield f"postgresql://mlflow:secret@/mlflow?host={folder}"
        finally:
            call(str(BIN / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")


def test_a_run_is_stored_and_continued(database: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    run_dir = tmp_path / "runs" / "first"
    run_dir.mkdir(parents=True)
    settings = Tracking(uri=database, experiment="e")
    for status, step in (("FAILED", 1), ("FINISHED", 2)):
        tracker = Tracker(settings, run_dir, group="first")
        run_id = tracker.start("improve", params={"improve": {"updates": 2}}, tags={})
        tracker.log({"reward": step / 2}, step)
        (run_dir / "note.txt").write_text("x")
        tracker.artifact(run_dir / "note.txt")
        tracker.finish(status)  # type: ignore[arg-type]
        tracker.close()
    client = MlflowClient(tracking_uri=database)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"improve.updates": "2"}
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "reward")] == [(1, 0.5), (2, 1.0)]
    assert run.info.artifact_uri.startswith((tmp_path / "runs" / "mlartifacts").as_uri()), "not in the working folder"
    record = read_record(run_dir)
    assert record is not None and record["runs"] == {"improve": run_id} and "secret" not in str(record)
