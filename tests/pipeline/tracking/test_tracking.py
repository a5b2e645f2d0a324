"""MLflow tracking: what is stored, resuming without doubled steps, and a store that is away."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.loading import dump_config
from configs.redaction import without_secrets
from configs.schema import RunConfig, Tracking
from pipeline.experiments.comparison_record import save
from pipeline.runs.context import StageContext, StageResult
from pipeline.runs.metrics_log import RunLog
from pipeline.storage import checkpoints
from pipeline.storage.atomic import sha256_file
from pipeline.tracking.lineage import prompts_hash
from pipeline.tracking.mlflow_store import Data
from pipeline.tracking.server import deep_link
from pipeline.tracking.stage_record import note_result
from pipeline.tracking.stage_record import tracking as tracking_of
from pipeline.tracking.system_metrics import gpu
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.uris import flatten, read_record, tracking_uri
from rollout_workers.tasks.countdown import Countdown


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; they share its sqlite store, which takes seconds to make."""
    return tmp_path_factory.mktemp("runs")


def new_run(runs: Path, name: str) -> Path:
    (runs / name).mkdir()
    return runs / name


def client(runs: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")


def curve(runs: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client(runs).get_metric_history(run_id, key))


def test_a_stage_is_a_run_with_params_tags_metrics_and_artifacts(runs: Path) -> None:
    run_dir = new_run(runs, "one")
    tracker = Tracker(Tracking(tags={"team": "x"}), run_dir, group="one")
    params = {
        "seed": 3,
        "improve": {"updates": 2, "top_k": None, "data": [1, 2]},
        "tracking": {"uri": "http://me:secret@host/x"},
    }
    run_id = tracker.start("improve", params, {"algorithm": "grpo", "seed": "3"})
    assert run_id
    tracker.log({"reward": 0.5, "rewards/max%": 1.0, "nan": float("nan")}, 1)
    tracker.log({"reward": 0.75}, 2)
    (run_dir / "a.txt").write_text("hello")
    tracker.artifact(run_dir / "a.txt", "checkpoint")
    tracker.dataset(Data(name="replay", digest=lambda: "5f" * 32, kind="local", source='{"uri": "file:///x"}'))
    tracker.tag({"gates": "failed", "gate: success at least 0.6": "failed (0.5)"})
    tracker.tag({"gates": "passed"})
    tracker.finish("FINISHED")
    run = client(runs).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["improve.updates"] == "2"
    assert run.data.params["improve.top_k"] == "null"
    assert run.data.params["improve.data"] == "[1, 2]"
    assert "secret" not in json.dumps(run.data.params)
    tags = run.data.tags
    assert (tags["group"], tags["stage"], tags["algorithm"], tags["seed"], tags["team"]) == (
        "one",
        "improve",
        "grpo",
        "3",
        "x",
    )
    assert (tags["gates"], tags["gate: success at least 0.6"]) == ("passed", "failed (0.5)"), "the later one counts"
    assert "mlflow.parentRunId" not in tags
    assert curve(runs, run_id, "reward") == [(1, 0.5), (2, 0.75)]
    assert curve(runs, run_id, "rewards/max_") == [(1, 1.0)]
    assert [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs] == [("replay", "5f" * 16)]
    assert (runs / "mlartifacts").is_dir()
    assert [f.path for f in client(runs).list_artifacts(run_id, "checkpoint")] == ["checkpoint/a.txt"]
    experiment = client(runs).get_experiment_by_name("latent-control")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    record = read_record(run_dir)
    assert record == {
        "tracking_uri": f"sqlite:///{runs / 'mlflow.db'}",
        "experiment_id": experiment.experiment_id,
        "runs": {"improve": run_id},
    }


def test_resuming_continues_the_same_run_without_doubled_steps(runs: Path) -> None:
    run_dir = new_run(runs, "two")
    first = Tracker(Tracking(), run_dir, group="two")
    clone_id = first.start("clone", {"a": 1}, {})
    first.finish("FINISHED")
    run_id = first.start("improve", {"a": 1}, {})
    for step in range(1, 6):
        first.log({"reward": step}, step)
    first.log({"held/nll": 0.5}, 5)
    first.finish("KILLED")
    assert client(runs).get_run(run_id).info.status == "KILLED"
    again = Tracker(Tracking(), run_dir, group="two")
    assert again.start("improve", {"a": 2}, {}) == run_id
    assert client(runs).get_run(run_id).info.status == "RUNNING"
    for step in range(4, 8):
        again.log({"reward": 10 * step, "new": 1.0}, step)
    again.finish("FINISHED")
    assert curve(runs, run_id, "reward") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 60), (7, 70)]
    assert [step for step, _ in curve(runs, run_id, "new")] == [4, 5, 6, 7]
    assert read_record(run_dir)["runs"] == {"clone": clone_id, "improve": run_id}
    assert clone_id != run_id
    assert again.start("clone", {}, {}) == clone_id
    again.finish("FAILED")
    assert client(runs).get_run(clone_id).info.status == "FAILED"


def test_a_recorded_run_that_is_gone_is_replaced(runs: Path) -> None:
    run_dir = new_run(runs, "three")
    tracker = Tracker(Tracking(), run_dir, group="three")
    gone = tracker.start("clone", {}, {})
    tracker.finish("FINISHED")
    client(runs).delete_run(gone)
    new = tracker.start("clone", {}, {})
    assert new not in ("", gone)
    record = json.loads((run_dir / "mlflow.json").read_text())
    (run_dir / "mlflow.json").write_text(json.dumps(record | {"tracking_uri": "http://elsewhere"}))
    tracker.finish("FINISHED")
    assert tracker.start("clone", {}, {}) not in ("", gone, new)
    tracker.finish("FINISHED")


def test_switched_off_it_does_nothing(tmp_path: Path) -> None:
    tracker = Tracker(Tracking(enabled=False), tmp_path, group="g")
    assert tracker.start("clone", {}, {}) == ""
    tracker.log({"a": 1.0}, 1)
    tracker.artifact(tmp_path / "x")
    tracker.dataset(Data(name="x", digest=lambda: "", kind="local", source="{}"))
    tracker.finish("FINISHED")
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert read_record(tmp_path) is None


def test_logging_returns_at_once_and_what_cannot_be_stored_is_one_warning(
    runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = new_run(runs, "four")
    tracker = Tracker(Tracking(), run_dir, group="four")
    run_id = tracker.start("clone", {}, {})
    begun = time.perf_counter()
    for step in range(100):
        tracker.log({f"m{i}": step for i in range(40)}, step)
    assert time.perf_counter() - begun < 0.5
    tracker.artifact(run_dir / "nowhere.txt")
    tracker.finish("FINISHED")
    assert [r.message for r in caplog.records if "tracking" in r.message] == [
        f"tracking: artifact {run_dir / 'nowhere.txt'} was not stored: there is no file {run_dir / 'nowhere.txt'}"
    ]
    assert curve(runs, run_id, "m39") == [(step, float(step)) for step in range(100)]


def test_a_wrong_store_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(Tracking(uri="nonsense://x"), tmp_path, group="g")
    assert tracker.start("clone", {"a": 1}, {}) == ""
    tracker.log({"a": 1.0}, 1)
    tracker.finish("FINISHED")
    assert "nonsense" in caplog.text
    assert sum(r.name.startswith("pipeline.tracking") for r in caplog.records) <= 3


class Broken(http.server.BaseHTTPRequestHandler):
    """A store that answers 503 to everything."""

    def do_GET(self) -> None:
        self.send_error(503)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def broken_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_store_that_is_away_does_not_hold_training_up(
    tmp_path: Path, broken_server: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("pipeline.tracking.outbox._FIRST_RETRY", 0.05)
    tracker = Tracker(Tracking(uri=broken_server), tmp_path, group="g")
    begun = time.perf_counter()
    assert tracker.start("clone", {}, {}) == ""
    for step in range(50):
        tracker.log({"a": 1.0}, step)
    tracker.finish("FAILED")
    assert time.perf_counter() - begun < 12
    away = [r for r in caplog.records if "is away" in r.message]
    assert len(away) == 1, "one line for the whole outage"


def test_metrics_of_an_outage_are_sent_when_it_is_over(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = new_run(runs, "five")
    monkeypatch.setattr("pipeline.tracking.outbox._FIRST_RETRY", 0.01)
    tracker = Tracker(Tracking(), run_dir, group="five")
    run_id = tracker.start("clone", {}, {})
    whole: Callable[..., None] = tracker._store.client.log_batch
    outage = threading.Event()
    outage.set()

    def sometimes(*args: Any, **kwargs: Any) -> None:
        whole(*args, **kwargs)  # stored, but the answer is lost: tried again, it must not be there twice
        if outage.is_set():
            raise ConnectionError("no answer")

    monkeypatch.setattr(tracker._store.client, "log_batch", sometimes)
    for step in range(20):
        tracker.log({"a": step}, step)
    time.sleep(0.3)
    outage.clear()
    tracker.finish("FINISHED")
    assert curve(runs, run_id, "a") == [(step, float(step)) for step in range(20)]
    ours = [r.message for r in caplog.records if r.name == "pipeline.tracking.outbox"]  # other tests' threads log too
    assert [("away" in m, "back" in m) for m in ours] == [(True, False), (False, True)]


def test_system_metrics_go_on_counting_after_a_restart(runs: Path) -> None:
    run_dir = new_run(runs, "six")
    for status in ("KILLED", "FINISHED"):
        tracker = Tracker(Tracking(system_metrics=0.05), run_dir, group="six")
        run_id = tracker.start("clone", {}, {})
        deadline = time.monotonic() + 60
        before = len(curve(runs, run_id, "system/cpu_utilization_percentage"))
        while (
            len(curve(runs, run_id, "system/cpu_utilization_percentage")) < before + 2 and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        tracker.finish(status)  # type: ignore[arg-type]
        tracker.close()
    steps = [step for step, _ in curve(runs, run_id, "system/cpu_utilization_percentage")]
    assert len(steps) >= 4 and steps == list(range(len(steps))), "no step twice, none left out"
    assert 0 < curve(runs, run_id, "system/system_memory_usage_percentage")[0][1] <= 100


def test_a_line_of_a_gpu() -> None:
    assert gpu(1, "87, 1000, 4000, 210.5") == {
        "gpu_1_utilization_percentage": 87.0,
        "gpu_1_memory_usage_megabytes": 1000 * 2**20 / 1e6,
        "gpu_1_memory_usage_percentage": 25.0,
        "gpu_1_power_usage_watts": 210.5,
    }
    assert gpu(0, "[N/A], 1000, [N/A], [N/A]") == {"gpu_0_memory_usage_megabytes": 1000 * 2**20 / 1e6}


def test_a_stage_says_what_it_read_and_made(runs: Path) -> None:
    run_dir = new_run(runs, "seven")
    config = RunConfig(
        base={"model": "x"}, actions={}, clone={}, improve={"evaluate_every": 5}, tracking={"checkpoints": "files"}
    )
    (run_dir / "config.yaml").write_text(dump_config(config))
    source, result = (run_dir / "checkpoints" / name for name in ("clone", "improve"))
    for folder in (source, result):
        checkpoints.write(
            folder, files=lambda staging: (staging / "w.bin").write_bytes(b"1") and None, info={"stage": folder.name}
        )
    tracker = Tracker(config.tracking, run_dir, group="seven")
    context = StageContext(config=config, run_dir=run_dir, log=RunLog(run_dir, quiet=True), task=Countdown())
    with tracking_of(context, tracker, "improve", source):
        note_result(tracker, context, StageResult(checkpoint=result), source)
    tracker.close()
    found = client(runs).get_run(read_record(run_dir)["runs"]["improve"])
    tags = found.data.tags
    assert (
        tags["checkpoint_hash"]
        == sha256_file(result / "manifest.json")
        != tags["source_hash"]
        == sha256_file(source / "manifest.json")
    )
    assert tags["config_hash"] == sha256_file(run_dir / "config.yaml")
    assert (tags["task"], tags["level"], tags["mode"], tags["algorithm"]) == ("countdown", "latent", "sync", "grpo")
    data = {i.dataset.name: (i.dataset.digest, i.tags[0].value) for i in found.inputs.dataset_inputs}
    assert {name: purpose for name, (_, purpose) in data.items()} == {
        "countdown/train": "training",
        "countdown/heldout": "evaluation",
    }
    assert data["countdown/train"][0] == prompts_hash(Countdown(), "train", {})[:32]
    files = [f.path for f in client(runs).list_artifacts(found.info.run_id, "checkpoint")]
    assert files == ["checkpoint/manifest.json", "checkpoint/w.bin"], "tracking.checkpoints: files"


def test_a_comparison_is_a_run_of_its_own_that_names_what_it_compares(runs: Path) -> None:
    ids = []
    for name in ("left", "right"):
        run_dir = new_run(runs, name)
        (run_dir / "config.yaml").write_text(
            dump_config(RunConfig(base={"model": "x"}, actions={}, clone={}, improve={}))
        )
        tracker = Tracker(Tracking(), run_dir, group=name)
        ids.append(tracker.start("improve", {}, {}))
        tracker.finish("FINISHED")
    page = runs / "right" / "page.html"
    page.write_text("x")
    result = {
        "a": [str(runs / "left")],
        "b": [str(runs / "right")],
        "variants": ["improved", "improved"],
        "config": [{"key": "seed", "values": ["0", "1"]}],
        "success": {"sampled": {"mean": 0.25, "low": 0.125, "high": 0.5}},
        "costs": {"a_over_b": {"seconds": 0.5, "tokens": None}},
        "verdict": "A is better by 0.250",
    }
    saved = save(result, page)
    assert saved.not_tracked == "" and saved.link.endswith(
        f"runs=%5B%22{ids[0]}%22%2C%22{ids[1]}%22%5D&experiments=%5B%221%22%5D"
    )
    assert json.loads(saved.record.read_text())["verdict"] == result["verdict"]
    own = client(runs).get_run(read_record(runs / "right")["runs"]["compare_with-left"])
    assert own.data.metrics == {
        "sampled/difference": 0.25,
        "sampled/low": 0.125,
        "sampled/high": 0.5,
        "a_over_b/seconds": 0.5,
    }
    assert own.data.params == {"seed": "0 | 1"}
    tags = own.data.tags
    assert (tags["stage"], tags["compared_a"], tags["compared_b"]) == ("compare", *ids)
    assert (
        tags["mlflow.note.content"].startswith("A is better by 0.250")
        and f"runs/{ids[0]}" in tags["mlflow.note.content"]
    )
    assert len(client(runs).list_artifacts(own.info.run_id, "compare")) == 2


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(None, Path("runs/a")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking_uri("sqlite:///x.db", tmp_path) == f"sqlite:///{tmp_path}/x.db"
    assert tracking_uri("http://host:5000", tmp_path) == "http://host:5000"
    assert without_secrets("http://me:pw@host:5000/x") == "http://me:***@host:5000/x"
    assert without_secrets("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert (
        deep_link("7")
        == "http://127.0.0.1:5000/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART"
    )
    assert deep_link("7", group="a b").endswith("&searchFilter=tags.group%20%3D%20%22a%20b%22")
    assert flatten({"a": {"b": {}, "c": True}, "d": "x"}) == {"a.b": "{}", "a.c": "true", "d": "x"}
