"""Passwords and tokens are in the user's own config and nowhere else: not in what a run writes, sends or prints, nor in
what programs of others see. Oracle: a search for the secret in every byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from configs.loading import dump_config
from configs.redaction import is_secret, public_environment, without_secrets
from configs.schema import RunConfig, Tracking
from pipeline.runs import manifest
from pipeline.runs.events import Events
from pipeline.runs.metrics_log import RunLog
from pipeline.serving.export import Source, export
from pipeline.tracking.stage_record import stage_tags
from pipeline.tracking.tracker import Tracker
from rollout_workers.environments.client import Worlds
from rollout_workers.tasks.sandbox import Function, Isolation

pytest_plugins = ("rl_fixtures",)
SECRET = "hunter2-Zz9"
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"http://me:{SECRET}@host:5000/x", "http://me:***@host:5000/x"),
        (f"https://{SECRET}@host/x", "https://***@host/x"),
        (f"https://:{SECRET}@host/x", "https://***:***@host/x"),
        ("http://me:hunter2%2DZz9%40@host/", "http://me:***@host/"),
        (f"http://me:a/{SECRET}@host:5000/x", "http://me:***@host:5000/x"),
        (f"postgresql+psycopg2://me:{SECRET}@h/db?sslmode=no", "postgresql+psycopg2://me:***@h/db?sslmode=no"),
        (f"postgresql://h/db?user=me&password={SECRET}", "postgresql://h/db?user=me&password=***"),
        (f"https://h/?token={SECRET}#access_token={SECRET}", "https://h/?token=***#access_token=***"),
        (f"s3://k:{SECRET}@bucket/x?X-Amz-Signature={SECRET}", "s3://k:***@bucket/x?X-Amz-Signature=***"),
        (f"no answer from 'https://u:{SECRET}@h/x' (port=443)", "no answer from 'https://u:***@h/x' (port=443)"),
        (f'["https://u:{SECRET}@h", "b@c"]', '["https://u:***@h", "b@c"]'),
        (f"/home/https:/u:{SECRET}@h/x is not there", "/home/https:/u:***@h/x is not there"),
        (f"http://[bad:{SECRET}@h/", "http://[bad:***@h/"),
        *((same, same) for same in ("sqlite:////a/key=3/b.db", "http://127.0.0.1:5000/a@b", "me@host", "a: b", "")),
    ],
)
def test_urls_lose_their_secrets_wherever_they_stand(text: str, wanted: str) -> None:
    assert without_secrets(text) == wanted
    assert without_secrets(wanted) == wanted


def test_values_of_secret_variables_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD")
    for number, name in enumerate(names):
        assert is_secret(name)
        monkeypatch.setenv(name, f"a/{SECRET}{number}")
        assert without_secrets(f"401 for a/{SECRET}{number}, a%2F{SECRET}{number}") == "401 for ***, ***"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "nonsense")
    assert without_secrets("nonsense") == "nonsense"


class Store(BaseHTTPRequestHandler):
    """Stands in for a tracking server that answers 401, and quotes the request."""

    def answer(self) -> None:
        length = int(self.headers.get("content-length", 0))
        self.server.seen.append(self.path.encode() + self.rfile.read(length))  # type: ignore[attr-defined]
        body = json.dumps({"error_code": "UNAUTHENTICATED", "message": f"no: http://me:{SECRET}@here"}).encode()
        self.send_response(401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_: object) -> None:
        """Nothing to the terminal."""


@pytest.fixture
def refusing() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Store)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("away", [True, False])
def test_a_store_that_is_away_or_refuses_leaves_no_secret(
    tmp_path: Path,
    tiny_base: Path,
    refusing: HTTPServer,
    away: bool,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = 1 if away else refusing.server_port
    uri = f"http://me:{SECRET}@127.0.0.1:{port}"
    config = RunConfig(base={"model": str(tiny_base)}, tracking={"uri": uri})
    manifest.put(tmp_path, "config.yaml", dump_config(config).encode(), keep=True)
    tracker = Tracker(config.tracking, tmp_path, group="g", note=Events(tmp_path).note)
    log = RunLog(tmp_path, tracker=tracker)
    tags = stage_tags(config, tmp_path, "actions")
    tracker.start("actions", params=config.model_dump(mode="json"), tags=tags, patience=3.0)
    tracker.artifact(tmp_path / "config.yaml")
    log.message(f"could not reach {uri}", "tracking_lost", uri=uri)
    tracker.finish("FAILED", patience=1.0)
    log.message(tracker.lost(), "tracking_lost")
    tracker.close()
    written = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert SECRET.encode() in written.pop("config.yaml") and {"events.jsonl", "manifest.json"} <= written.keys()
    assert [name for name, data in written.items() if SECRET.encode() in data] == []
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err + caplog.text
    assert not any(SECRET.encode() in request for request in refusing.seen)  # type: ignore[attr-defined]


def test_the_store_gets_the_config_without_secrets(tmp_path: Path, tiny_base: Path) -> None:
    """The truth is on sqlite's side: whatever MLflow stored is searched."""
    task = {"name": "countdown", "options": {}}
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = RunConfig(base={"model": str(tiny_base)}, task=task, tracking={"uri": uri, "tags": {}})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config).replace(uri, f"http://me:{SECRET}@h"))
    tracker = Tracker(Tracking(uri=uri), folder, group="g")
    params = {"tracking": {"uri": f"http://me:{SECRET}@h"}, "list": [f"https://u:{SECRET}@h/x"]}
    tracker.start("actions", params=params, tags={"stage": "actions"})
    tracker.artifact(folder / "config.yaml")
    assert tracker.finish("FINISHED", patience=60.0) and tracker.lost() == ""
    tracker.close()
    stored = [path for path in tmp_path.rglob("*") if path.is_file() and path != folder / "config.yaml"]
    assert any(path.name == "config.yaml" for path in stored)
    assert [path for path in stored if SECRET.encode() in path.read_bytes()] == []


def test_an_export_names_no_secret(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    text = (finished_run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("uri: null", f"uri: http://me:{SECRET}@h"))
    assert SECRET in (run / "config.yaml").read_text()
    out = export(Source(checkpoint=finished_run / "checkpoints" / "clone", run_dir=run), tmp_path / "out")
    assert [path for path in out.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []
    assert "http://me:***@h" in (out / "provenance.json").read_text()


@pytest.mark.parametrize(
    "model",
    [
        f"https://u:{SECRET}@huggingface.co/x",
        pytest.param(f"s3://k:{SECRET}@b/x?token={SECRET}", marks=pytest.mark.slow),
    ],
)
def test_the_terminal_shows_none(tmp_path: Path, model: str) -> None:
    (tmp_path / "c.yaml").write_text(
        f"base: {{model: '{model}'}}\ntracking: {{uri: 'http://me:{SECRET}@127.0.0.1:1'}}\n"
    )
    for command in (["--debug", "config", "check"],):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *command, "c.yaml"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode and done.stderr and SECRET not in done.stdout + done.stderr


def test_programs_of_others_see_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": SECRET, "JUDGE_API_KEY": SECRET, "DATABASE_URL": f"postgresql://me:{SECRET}@h/db"}
    for name, value in (secrets | {"ALFWORLD_DATA": "/data"}).items():
        monkeypatch.setenv(name, value)
    assert public_environment().keys().isdisjoint(secrets) and public_environment()["ALFWORLD_DATA"] == "/data"
    (tmp_path / "spying.py").write_text(
        "import os\n"
        "class World:\n"
        "    def reset(self, episode): return ' '.join(sorted(os.environ)) + ' '.join(os.environ.values())\n"
        "class Spying:\n"
        "    def __init__(self, **options): pass\n"
        "    def episodes(self, split): return [{}]\n"
        "    def make(self): return World()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    worlds = Worlds("environment/spying:Spying", {})
    seen = worlds.begin([{}])[0]
    worlds.close()
    assert "ALFWORLD_DATA" in seen and SECRET not in seen


def test_a_reward_names_the_variable_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    path = tmp_path / "reward.py"
    path.write_text(
        "from os import environ\n"
        "def reward(row, response):\n"
        "    return 2 * ('HF_TOKEN' in environ) + ('JUDGE_API_KEY' in environ)\n"
    )
    for variables, wanted in (((), 0.0), (("JUDGE_API_KEY",), 1.0)):
        function = Function(path=str(path), name="reward", seconds=20.0, megabytes=2048, variables=variables)
        isolation = Isolation(function)
        assert isolation.call([{}], ["x"]) == [{"reward": wanted}]
        isolation.close()
