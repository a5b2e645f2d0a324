"""From a run to production: export, text completions, MLflow model, HTTP. The inverse dynamics model is absent everywhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from configs.loading import dump_config
from latent_control import LatentActionLM
from latent_control.text import TextModel
from pipeline import checkpoints, cli, cli_serving
from pipeline.export import PROVENANCE, require_free

pytest_plugins = ("rl_fixtures",)

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"num_actions": 8, "policy_layers": 1, "inverse_dynamics_layers": 1, "merge_layers": 1}
PROMPT = "3 5 7 -> 36 :"
assert cli_serving.cli is cli


def call(*words: str) -> Any:
    return CliRunner().invoke(cli.app, list(words))


@pytest.fixture(scope="module")
def run_dir(config: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last policy is the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("serving") / "run"
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    checkpoints.write(folder / "checkpoints" / "clone", files=lambda staging: model.save_pretrained(staging), info={"stage": "clone"})
    settings = config(actions=SHAPE | {"init": str(tiny_checkpoint), "updates": 0}, tracking={"enabled": False})
    (folder / "config.yaml").write_text(dump_config(settings))
    return folder


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    found = call("export", str(run_dir), "--json")
    assert found.exit_code == 0, found.output
    return run_dir / "export"


@pytest.fixture(scope="module")
def text(exported: Path) -> TextModel:
    return TextModel.load(exported)


# -- the folder --------------------------------------------------------------------------------------------------------


def test_an_export_is_whole_says_where_it_comes_from_and_lacks_the_inverse_dynamics_model(exported: Path, run_dir: Path) -> None:
    assert not checkpoints.verify(exported)
    told = json.loads((exported / PROVENANCE).read_text())
    assert (told["run"], told["stage"]) == ("run", "clone")
    assert told["checkpoint_seal"] == json.loads((run_dir / "checkpoints" / "clone" / "manifest.json").read_text())["seal_sha256"]
    assert LatentActionLM.from_pretrained(exported).inverse_dynamics is None
    assert {path.suffix for path in exported.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".jinja"}


def test_it_decodes_as_the_checkpoint_does(exported: Path, run_dir: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    one, other = (LatentActionLM.from_pretrained(folder) for folder in (exported, run_dir / "checkpoints" / "clone"))
    assert torch.equal(one.generate(ids, max_new_tokens=8, seed=1).tokens, other.generate(ids, max_new_tokens=8, seed=1).tokens)


def test_another_folders_content_is_not_overwritten(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    found = call("export", str(run_dir), "--out", str(tmp_path))
    assert found.exit_code == cli.USAGE and "holds no export" in found.output
    assert (tmp_path / "mine").exists()


def test_a_damaged_checkpoint_is_not_exported(run_dir: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    weights = copy / "checkpoints" / "clone" / "latent_actions.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    found = call("export", str(copy), "--out", str(tmp_path / "out"))
    assert found.exit_code == cli.FAILED and "damaged" in found.output
    assert not (tmp_path / "out").exists()


# -- text --------------------------------------------------------------------------------------------------------------


def test_a_seeded_completion_is_the_same_in_any_company(text: TextModel) -> None:
    alone = text.complete([text.ask(PROMPT, seed=3)])[0]
    company = [text.ask("1 2 3 4 5 6 :", max_new_tokens=3), text.ask(PROMPT, seed=3), text.ask(PROMPT, temperature=0)]
    beside = text.complete(company)[1]
    assert (beside.text, beside.codes) == (alone.text, alone.codes)
    assert beside.code_log_probs == pytest.approx(alone.code_log_probs, abs=1e-4)
    assert len(alone.codes) == len(alone.tokens) == len(alone.code_log_probs)


def test_forced_and_allowed_codes_hold_row_by_row(text: TextModel) -> None:
    asks = [text.ask(PROMPT, codes=[5, -1, 2], seed=1), text.ask(PROMPT, allowed_codes=[1, 3], seed=1), text.ask(PROMPT, seed=1)]
    first, second, third = text.complete(asks)
    assert first.codes[0] == 5 and first.codes[2:3] in ([2], [])
    assert set(second.codes) <= {1, 3}
    assert third.codes == text.complete([text.ask(PROMPT, seed=1)])[0].codes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"codes": [8]}, "codes holds 8: need 0 to 7"),
        ({"allowed_codes": []}, "allowed_codes is empty"),
        ({"allowed_codes": [-1]}, "allowed_codes holds -1"),
        ({"max_new_tokens": 10_000}, "exceed the model's"),
    ],
)
def test_a_wrong_request_is_named(text: TextModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text.ask(PROMPT, **settings)


def test_a_conversation_needs_a_template(text: TextModel) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        text.ask([{"role": "user", "content": PROMPT}])


# -- MLflow ------------------------------------------------------------------------------------------------------------

LOAD = """
import json, sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/countdown@champion")
found = model.predict([{"prompt": sys.argv[2]}], params={"temperature": 0.0, "max_new_tokens": 8})
print(json.dumps([found["text"][0], [int(c) for c in found["codes"][0]]]))
"""


def test_a_registered_model_answers_where_only_mlflow_knows_it(run_dir: Path, text: TextModel, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    (tmp_path / "store").mkdir()
    out = str(tmp_path / "export")
    found = call("export", str(run_dir), "--out", out, "--register", "countdown", "--alias", "champion", "--tracking-uri", store)
    assert found.exit_code == 0, found.output
    assert "models:/countdown@champion" in found.output
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -P -s: neither this folder nor the user's packages; what is imported of ours comes with the model.
    command = [sys.executable, "-P", "-s", "-c", LOAD, store, PROMPT]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = text.complete([text.ask(PROMPT, temperature=0, max_new_tokens=8)])[0]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [wanted.text, wanted.codes]


# -- HTTP --------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_port_in_use_is_said_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="in use"):
            require_free("127.0.0.1", taken.getsockname()[1])


@pytest.fixture(scope="module")
def address(exported: Path) -> Iterator[str]:
    """A server in its own process, ended as a container would."""
    pytest.importorskip("grpc_reflection", reason="Ray Serve's packages are not installed: pip install -e '.[serve]'")
    port = free_port()
    command = [sys.executable, "-m", "pipeline", "serve", str(exported), "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        told = []
        for line in server.stdout:
            told.append(line)
            if line.startswith("try:"):
                break
        assert server.poll() is None, "".join(told)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGTERM)
        started = time.monotonic()
        server.wait(timeout=60)
        assert server.returncode == cli.INTERRUPTED and time.monotonic() - started < 30


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/{path}", data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_completions_over_http_are_the_models(address: str, text: TextModel) -> None:
    status, reply = ask(address, "completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 8})
    wanted = text.complete([text.ask(PROMPT, temperature=0, max_new_tokens=8)])[0]
    assert status == 200
    assert reply["choices"][0]["text"] == wanted.text and reply["choices"][0]["codes"] == wanted.codes
    assert reply["usage"] == {
        "prompt_tokens": wanted.prompt_tokens,
        "completion_tokens": len(wanted.codes),
        "total_tokens": wanted.prompt_tokens + len(wanted.codes),
    }
    assert ask(address, "models")[1]["data"][0]["num_actions"] == 8


def test_several_prompts_and_copies_come_in_order_and_repeat(address: str) -> None:
    body = {"prompt": [PROMPT, "1 2 3 -> 6 :"], "n": 2, "seed": 7, "codes": [4]}
    first, second = ask(address, "completions", body)[1], ask(address, "completions", body)[1]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2, 3]
    assert [choice["codes"] for choice in first["choices"]] == [choice["codes"] for choice in second["choices"]]
    assert {choice["codes"][0] for choice in first["choices"]} == {4}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": PROMPT, "top_p": 0.9}, 422, "top_p"),
        ({"prompt": PROMPT, "codes": [8]}, 400, "codes holds 8"),
        ({"prompt": PROMPT, "max_tokens": 0}, 400, "max_new_tokens=0"),
        ({"prompt": [PROMPT] * 65, "n": 2}, 400, "at most 128"),
        ({}, 422, "prompt"),
    ],
)
def test_bad_requests_get_a_reason(address: str, body: dict[str, Any], status: int, message: str) -> None:
    code, reply = ask(address, "completions", body)
    assert code == status and message in json.dumps(reply)


def test_chat_without_a_template_is_refused(address: str) -> None:
    code, reply = ask(address, "chat/completions", {"messages": [{"role": "user", "content": PROMPT}]})
    assert code == 400 and "chat template" in reply["detail"]
