"""What a stranger's shell says (variables of Ray, MLflow, proxies; folders) is heeded, or refused before the start."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.loading import load_config
from configs.schema import Cluster, RunConfig, Tracking
from pipeline.cli.main import app
from pipeline.cluster import submit as jobs
from pipeline.cluster.connect import joined
from pipeline.preflight.check import tracking_problems, tracking_warnings
from pipeline.preflight.surroundings import ray_problems
from pipeline.runs.errors import RunError
from pipeline.serving.registry import require_names
from pipeline.tracking.mlflow_store import experiments
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.uris import experiment_of, heeded, tracking_uri

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
RAY = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "TMPDIR")
MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
TOKEN = "MLFLOW_TRACKING_TOKEN"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RAY, *MLFLOW, TOKEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def tracked(**settings: object) -> RunConfig:
    config = load_config(QUICKSTART)
    return config.model_copy(update={"tracking": Tracking.model_validate(settings)})


def at(address: str) -> RunConfig:
    return load_config(QUICKSTART).model_copy(update={"cluster": Cluster(address=address)})


# -- Ray ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "token", "disabled", "TOKEN"])
def test_ways_to_log_in_that_ray_knows(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert not list(ray_problems(at("local")))


def test_a_way_to_log_in_that_ray_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "off")
    (problem,) = ray_problems(at("local"))
    assert "'off'" in problem and "disabled" in problem


def test_a_cluster_needs_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (problem,) = ray_problems(at("auto"))
    assert "RAY_AUTH_TOKEN" in problem and "ray get-auth-token" in problem
    assert not list(ray_problems(at("local")))  # it gets a token of its own
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    assert not list(ray_problems(at("auto")))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("abc")
    assert not list(ray_problems(at("auto")))


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, None),
        ({"TMPDIR": "/" + 36 * "x"}, None),
        ({"TMPDIR": "/" + 90 * "x"}, "TMPDIR"),
        ({"TMPDIR": "/" + 90 * "x", "RAY_TMPDIR": "/tmp"}, None),
        ({"RAY_TMPDIR": "/" + 25 * "é"}, "RAY_TMPDIR"),  # bytes count
    ],
)
def test_a_folder_too_long_for_sockets(
    variables: dict[str, str], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    problems = list(ray_problems(at("local")))
    assert [problem.split(":")[0] for problem in problems] == ([named] if named else [])
    assert not list(ray_problems(at("auto")))  # another process started that Ray


def test_the_command_says_so_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 90)))
    monkeypatch.setenv("RAY_AUTH_MODE", "off")
    done = CliRunner().invoke(app, ["run", str(QUICKSTART), "--run-dir", str(tmp_path / "run")])
    assert done.exit_code == 2 and "TMPDIR" in done.stderr and "RAY_AUTH_MODE" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("slow", "starts"), [(0, 1), (2, 3), (9, 5)])
def test_a_slow_start_of_ray_is_waited_for(slow: int, starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def init(*, address: str, **_: object) -> None:
        calls.append(address)
        if len(calls) <= slow:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever this process's other tests have started
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with contextlib.suppress(RunError), joined("local", 1):
        pass
    assert len(calls) == starts


def test_a_cluster_that_does_not_let_us_in_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(RunError, match=r"joined at auto: .*any running Ray instance.*RAY_AUTH_MODE"), joined("auto", 1):
        pass


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_a_job_leaves_the_folder_that_ray_may_delete(tmp_path: Path) -> None:
    with jobs.staged(load_config(QUICKSTART)) as staged:
        rays = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
        shutil.copytree(staged, rays)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = ["job", "job.yaml", "actions.init=./nothing", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *command],
        env=os.environ | {"PYTHONPATH": str(rays), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
        cwd=rays,
    )
    assert done.returncode == 2, done.stderr
    assert str(temporary / "latent-control-job-") in done.stderr and str(rays) not in done.stderr
    assert not list(temporary.glob("latent-control-job-*"))  # it goes with the process


def test_a_job_is_sent_with_what_mlflow_needs_but_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct-horse")
    assert {
        "MLFLOW_TRACKING_URI": "http://tracking:5000",
        "MLFLOW_EXPERIMENT_NAME": "ours",
    }.items() <= jobs.sent().items()
    assert "correct-horse" not in str(jobs.sent())
    (line,) = jobs.not_sent()
    assert "MLFLOW_TRACKING_PASSWORD" in line and "correct-horse" not in line
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:correct-horse@tracking/db")
    assert "MLFLOW_TRACKING_URI" not in jobs.sent() and "MLFLOW_TRACKING_URI" in jobs.not_sent()[0]


# -- MLflow ------------------------------------------------------------------------------------------------------------


def test_mlflows_variables_hold_where_the_config_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(None, tmp_path / "run") == beside and not heeded(Tracking())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    assert tracking_uri(None, tmp_path / "run") == "http://tracking:5000"
    assert experiment_of(Tracking()) == "ours" and experiment_of(Tracking(experiment="mine")) == "mine"
    assert len(heeded(Tracking())) == 2 and all(" holds" in line for line in heeded(Tracking()))
    assert all("does not hold" in line for line in heeded(Tracking(uri="http://other", experiment="mine")))
    assert not heeded(Tracking(enabled=False))


@pytest.mark.parametrize(
    ("recorded", "found"), [("http://first:5000", "http://first:5000"), ("sqlite:////old/mlflow.db", None)]
)
def test_a_run_stays_on_the_store_that_it_has(
    recorded: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "mlflow.json").write_text(json.dumps({"tracking_uri": recorded, "experiment_id": "1", "runs": {}}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://second:5000")
    assert tracking_uri(None, run) == (found or f"sqlite:///{tmp_path}/mlflow.db")


class Locked(http.server.BaseHTTPRequestHandler):
    """An MLflow server behind a login, me:right."""

    def do_GET(self) -> None:
        wanted = "Basic " + base64.b64encode(b"me:right").decode()
        good = self.headers.get("Authorization") == wanted
        body = json.dumps({"experiments": [{"experiment_id": "7", "name": "ours"}]} if good else {}).encode()
        self.send_response(200 if good else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if good else b"x" * len(body))

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def locked() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Locked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_behind_a_login(locked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_USERNAME"):
        experiments(locked)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "right")
    assert experiments(locked) == {"7": "ours"}
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    (warning,) = tracking_warnings(tracked(uri=locked))
    assert "refuses the login" in warning and "latent-control sync" in warning
    tracker = Tracker(Tracking(uri=locked), tmp_path / "run", group="run")
    tracker.start("actions", params={}, tags={}, patience=3.0)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("FINISHED", patience=3.0)
    lost = tracker.lost()
    tracker.close()
    assert "MLFLOW_TRACKING_PASSWORD" in lost and "latent-control sync" in lost, "kept, and said how to send it"


def test_a_server_on_this_machine_is_not_reached_through_a_proxy(locked: str) -> None:
    code = (
        "import os; import pipeline; from pipeline.tracking.mlflow_store import experiments; "
        "import urllib.request as u; "
        f"print(experiments({locked!r}), u.proxy_bypass('127.0.0.1'), bool(u.proxy_bypass('elsewhere.example')))"
    )
    proxied = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "inside.example"}
    login = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "right"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | proxied | login | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("} ")[1].split() in (["1", "False"], ["True", "False"])


def test_a_store_in_a_folder_that_cannot_be_written() -> None:
    (problem,) = tracking_problems(tracked(uri="sqlite:////proc/mlflow.db"))
    assert problem.startswith("tracking.uri: /proc cannot be written")


@pytest.mark.parametrize("folder", ["a[", "a]b", "a b", "ä"])
def test_folders_with_odd_names_keep_their_store(folder: str, tmp_path: Path) -> None:
    run = tmp_path / folder / "b]"
    run.mkdir(parents=True)
    tracker = Tracker(Tracking(), run, group="run")
    tracker.start("actions", params={}, tags={}, patience=600.0)
    (run / "x.txt").write_text("x")
    tracker.artifact(run / "x.txt")
    assert tracker.finish("FINISHED", patience=600.0) and not tracker.lost()
    tracker.close()
    assert (run.parent / "mlflow.db").is_file() and list((run.parent / "mlartifacts").rglob("x.txt"))


def test_a_moved_store_does_not_write_to_the_old_place(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for runs in (old, new):
        if runs is new:
            old.rename(new)
        run = runs / "run"
        run.mkdir(parents=True, exist_ok=True)
        tracker = Tracker(Tracking(), run, group="run")
        tracker.start("actions", params={}, tags={}, patience=600.0)
        (run / "x.txt").write_text("x")
        tracker.artifact(run / "x.txt")
        tracker.finish("FINISHED", patience=600.0)
        lost = tracker.lost()
        tracker.close()
        assert ("" if runs is old else "tracking.experiment") in lost and bool(lost) == (runs is new)
    assert not old.exists()


@pytest.mark.parametrize(("name", "alias"), [("a/b", None), ("a:b", None), (" ", None), ("..", None)])
def test_names_that_mlflow_refuses(name: str, alias: str | None) -> None:
    with pytest.raises(ValueError, match="--register"):
        require_names(name, alias)


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "a b", "a/b", "", "a\n"])
def test_aliases_that_mlflow_refuses(alias: str) -> None:
    with pytest.raises(ValueError, match="--alias"):
        require_names("countdown", alias)


@pytest.mark.parametrize("alias", [None, "champion", "v1-rc", "latest-2", "A_1"])
def test_aliases_that_mlflow_takes(alias: str | None) -> None:
    from mlflow.utils.validation import _validate_model_alias_name

    require_names("count down.1", alias)
    assert alias is None or _validate_model_alias_name(alias) is None, "MLflow raises"
