"""The bank: its folder, its command, and a service that answers with many policies, through the ``openai`` client."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from rl_tools import NUM_ACTIONS
from safetensors.torch import load_file, save_file
from served import ask_all
from typer.testing import CliRunner

from configs.loading import dump_config
from latent_control import LatentActionLM
from latent_control.pretrained import load_policy, weights_hash
from latent_control.text import load_tokenizer
from pipeline.cli.main import app
from pipeline.serving import bank as banks
from pipeline.serving import deploy
from pipeline.serving.export import find
from pipeline.serving.service import Reply, Service
from pipeline.storage import checkpoints

pytest_plugins = ("rl_fixtures",)
needs_serve = pytest.mark.skipif(
    find_spec("grpc_reflection") is None or find_spec("openai") is None,
    reason="Ray Serve or openai is not installed: pip install -e '.[serve]' openai",
)
RunOf = Callable[..., Path]


@pytest.fixture(scope="module")
def run_of(tiny_base: Path, config: Any, tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """``run_of("formal", 3)``: a run whose policy is made of seed 3; ``world`` and shape are the same unless said."""
    root = tmp_path_factory.mktemp("runs")

    @lru_cache
    def made(name: str, seed: int, *, world: int = 1, width: int = 24, kind: str = "mlp") -> Path:
        shape = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_layers": 1, "policy_kind": kind}
        shape |= {"policy_width": width} if kind == "mlp" else {}
        model = LatentActionLM.from_base(tiny_base, num_actions=NUM_ACTIONS, seed=world, **shape)
        model.codebook.data *= 8
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.policy.parameters():
            torch.nn.init.normal_(parameter, std=0.4, generator=generator)
        folder = root / name
        checkpoints.write(
            folder / "checkpoints" / "clone",
            files=lambda staging: model.save_pretrained(staging) and None,
            info={"stage": "clone", "metrics": {}},
        )
        actions = {"num_actions": NUM_ACTIONS, "policy_kind": kind}
        (folder / "config.yaml").write_text(dump_config(config(actions=actions, clone={}, tracking={"enabled": False})))
        return folder

    return made


@pytest.fixture(scope="module")
def first_bank(run_of: RunOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = banks.create(find(run_of("first", 1)), tmp_path_factory.mktemp("banks") / "bank")
    for name, seed in (("concise", 1), ("formal", 2), ("concise", 3)):
        banks.add(made, name, find(run_of(f"{name}-{seed}", seed)))
    return made


@pytest.fixture
def bank(first_bank: Path, tmp_path: Path) -> Path:
    """Two policies, ``concise`` in two versions."""
    return Path(shutil.copytree(first_bank, tmp_path / "bank"))


def command(*words: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bank", *map(str, words)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


# -- the folder --------------------------------------------------------------------------------------------------------


def test_versions_aliases_and_lineage(bank: Path, run_of: RunOf) -> None:
    index = banks.read_index(bank)
    assert index.resolve("concise") == index.resolve("concise@latest") == "concise@2"
    assert index.resolve("concise@1") == "concise@1" and index.resolve("formal") == "formal@1"
    own = load_policy(run_of("concise-3", 3) / "checkpoints" / "clone").state_dict()
    digest = weights_hash(own.items())
    record = banks.read_record(bank, "concise@2")
    assert index.members["concise"][2] == record["sha256"] == digest
    assert record["parent"] == index.members["concise"][1] and banks.read_record(bank, "concise@1")["parent"] is None
    assert (record["stage"], record["checkpoint"], Path(record["run"]).name) == ("clone", "clone", "concise-3")
    found = load_file(bank / "members" / "concise@2.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
    assert "champion" in command("alias", bank, "concise@champion", "1") and "concise@1" in command("list", bank)
    assert banks.read_index(bank).resolve("concise@champion") == "concise@1"
    assert command("remove", bank, "concise@2") == "removed: concise@2"
    assert banks.read_index(bank).resolve("concise") == "concise@1"
    assert command("add", bank, "concise", run_of("concise-4", 4)) == "concise@3 is concise@latest", (
        "2 is not given again"
    )
    assert command("remove", bank, "formal") == "removed: formal@1"
    assert [path.name for path in sorted((bank / "members").glob("*.safetensors"))] == [
        "concise@1.safetensors", "concise@3.safetensors"
    ]  # fmt: skip
    listed = json.loads(CliRunner().invoke(app, ["bank", "list", str(bank), "--json"]).output)
    assert listed["aliases"] == {"concise": {"champion": 1, "latest": 3}} and set(listed["members"]) == {
        "concise@1", "concise@3"
    }  # fmt: skip


def test_what_is_no_member_is_refused_with_the_reason(bank: Path, run_of: RunOf, tmp_path: Path) -> None:
    for name, settings, message in (
        ("other-world", {"world": 2}, "has another codebook or merge module (world hash"),
        ("wide", {"width": 32}, "enter.bias is (32,), not (24,)"),
        ("blocks", {"kind": "blocks"}, "is of the kind blocks: members of a bank are mlp policies"),
    ):
        assert message in command("add", bank, "x", run_of(name, 1, **settings), code=2)
    for name in ("a/b", "../x", "", "a@1", ".hidden", "x" * 65, "é"):
        assert "is not a name: take letters" in command("add", bank, name, run_of("first", 1), code=2)
    assert "is not a name" in command("add", bank, "x", run_of("first", 1), "--alias", "3", code=2)
    assert "the model 'nobody' is not in the bank; there are concise, formal" in command(
        "remove", bank, "nobody", code=2
    )
    assert "is not a bank: make one with" in command("list", tmp_path, code=2)
    assert "is there already" in command("create", bank, "--from", run_of("first", 1), code=2)
    assert "code 8 does not exist: the bank's are 0 to 7" in command("ban", bank, "8", code=2)
    assert "leave one to choose" in command("ban", bank, *map(str, range(8)), code=2)
    assert set(banks.read_index(bank).hashes()) == {"concise@1", "concise@2", "formal@1"}


def test_a_base_of_another_hash_is_refused(bank: Path, run_of: RunOf, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run_of("first", 1) / "checkpoints" / "clone", folder)
    (folder / "manifest.json").unlink()
    saved = json.loads((folder / "latent_action_config.json").read_text())
    saved["base"]["sha256"] = "0" * 64
    (folder / "latent_action_config.json").write_text(json.dumps(saved))
    assert "was trained on another base LM (hash 000000000000" in command("add", bank, "x", folder, code=2)


def renamed(bank: Path) -> bytes:
    return (bank / "bank.json").read_bytes().replace(b"formal", b"normal")


def escaping(_: Path) -> bytes:
    return banks.sealed({"format": 1, "members": {"../x": {"1": "0" * 64}}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda _: b"{", "is not JSON"),
        (renamed, "does not match its own hash"),
        (escaping, r"is damaged: members.../x"),
        (lambda _: b"[" * (5 << 20), "has 5242880 bytes, at most 4194304 are read"),
    ],
)
def test_a_hostile_index_is_refused(bank: Path, content: Callable[[Path], bytes], message: str) -> None:
    (bank / "bank.json").write_bytes(content(bank))
    with pytest.raises(ValueError, match=message):
        banks.read_index(bank)


def test_a_hostile_member_is_not_read(bank: Path) -> None:
    path, index = bank / "members" / "formal@1.safetensors", banks.read_index(bank)
    like, digest = banks.policy_like(bank / "world"), index.members["formal"][1]
    tensors = load_file(path)

    def refused() -> str:
        with pytest.raises(ValueError) as error:
            banks.read_member(bank, "formal@1", digest, like)
        return str(error.value)

    save_file(tensors | {"head.weight": tensors["head.weight"] + 1}, path)
    assert "is not what was added" in refused()
    save_file(tensors | {"head.weight": tensors["head.weight"].double()}, path)
    assert "is not what was added" in refused()
    save_file(tensors | {"more": torch.zeros(1)}, path)
    assert "more is unknown" in refused()
    path.write_bytes(path.read_bytes() + b"\0" * (1 << 17))
    assert "a policy of the bank's shape" in refused()
    path.write_bytes(b"\x80\x04 no safetensors")
    assert "is not a whole safetensors file" in refused()


def test_a_member_taken_out_is_a_checkpoint(bank: Path, run_of: RunOf, tmp_path: Path) -> None:
    assert command("take", bank, "formal", "-o", tmp_path / "taken").startswith("formal@1: ")
    own = LatentActionLM.from_pretrained(run_of("formal-2", 2) / "checkpoints" / "clone")
    taken = LatentActionLM.from_pretrained(find(tmp_path / "taken").checkpoint)
    ids = torch.tensor([[5, 9, 11]])
    one, other = (model.generate(ids, max_new_tokens=5, seed=1) for model in (own, taken))
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.action_logp, other.action_logp)


# -- the service -------------------------------------------------------------------------------------------------------


def said(reply: Reply) -> Any:
    assert reply.status == 200, reply.body
    return reply.body


def refusal(service: Service, **body: Any) -> tuple[int, str, str | None]:
    reply = ask_all(service, {"prompt": "3 5 7"} | body)[0]
    assert isinstance(reply.body, dict)
    error = reply.body["error"]
    return reply.status, error["message"], error["param"]


def test_requests_of_many_policies_share_a_batch(bank: Path, run_of: RunOf) -> None:
    """Each answers as the run that it came from, served alone."""
    service = Service(bank, "bank")
    names = {"concise": ("concise-3", 3), "concise@1": ("concise-1", 1), "formal": ("formal-2", 2)}
    common = {"prompt": ["3 5 7", "10"], "temperature": 1.0, "seed": 4, "n": 3}
    bodies = [common | {"model": name} for name in names]
    mixed = ask_all(service, *bodies, common | {"mix": {"concise": 0.7, "formal": 0.3}})
    texts = set()
    for reply, (name, (run, seed)) in zip(mixed, names.items(), strict=False):
        model = LatentActionLM.from_pretrained(run_of(run, seed) / "checkpoints" / "clone")
        service_alone = Service(bank, "bank")
        service_alone.members, service_alone.actor = None, model.actor()
        service_alone.reader.members = None
        service_alone.loop.engine = service_alone._engine()
        (alone,) = ask_all(service_alone, common)
        for here, there in zip(said(reply)["choices"], said(alone)["choices"], strict=True):
            assert here.pop("code_logprobs") == pytest.approx(there.pop("code_logprobs"), abs=1e-5)
            assert here == there
        assert said(reply)["model"] == {"concise": "concise@2", "concise@1": "concise@1", "formal": "formal@1"}[name]
        texts.add(str(said(reply)["choices"]))
    assert len(texts) == 3
    assert said(mixed[3])["model"] == "concise@2*0.7+formal@1*0.3"
    models = [
        LatentActionLM.from_pretrained(run_of(*names[name]) / "checkpoints" / "clone") for name in ("concise", "formal")
    ]
    ids = service.tokenizer("3 5 7", return_tensors="pt").input_ids
    states = models[0].features(ids)
    with torch.no_grad():
        logs = [model.policy_logits(states)[0, -1].log_softmax(-1) for model in models]
    choice = said(mixed[3])["choices"][0]
    wanted = float((0.7 * logs[0] + 0.3 * logs[1]).log_softmax(-1)[choice["codes"][0]])
    assert choice["code_logprobs"][0] == pytest.approx(wanted, abs=1e-4)


def test_what_cannot_be_asked_of_a_bank(bank: Path) -> None:
    service = Service(bank, "bank")
    listed = said(ask_all(service, {}, path="/v1/models", method="GET")[0])["data"]
    assert {(one["id"], one["root"]) for one in listed} >= {("concise", "concise@2"), ("concise@1", "concise@1")}
    status, message, param = refusal(service, model="nobody")
    assert (status, param) == (404, "model") and "the model 'nobody' is not in the bank; there are concise" in message
    assert refusal(service, model="concise@7")[:2] == (
        404,
        "the model 'concise@7' is not in the bank; there are concise@1, concise@2",
    )
    assert refusal(service)[::2] == (400, "model")
    assert refusal(service, mix={"nobody": 1.0})[::2] == (404, "mix")
    for mix in ({}, {"concise": 0}, {"concise": -1.0}, {"concise": float("nan")}, {"concise": 1e9}, {"concise": "1"},
                {"concise": True}, {f"p{i}": 0.1 for i in range(17)}, {"concise": 0.5, "concise@2": 0.5}):  # fmt: skip
        status, message, param = refusal(service, mix=mix)
        assert (status, param) == (400, "mix"), (mix, message)


def test_no_banned_code_is_chosen(bank: Path) -> None:
    """Enumerated over all codes of many answers, of all policies and mixes; forcing one is refused."""
    service = Service(bank, "bank")
    bodies = [
        {"prompt": [str(number) for number in range(1, 9)], "n": 4, "temperature": 2.0, "seed": seed} | asked
        for seed, asked in enumerate(({"model": "concise"}, {"model": "formal"}, {"mix": {"concise": 1, "formal": 1}}))
    ]

    def chosen(**more: Any) -> set[int]:
        replies = ask_all(service, *(body | more for body in bodies))
        return {code for reply in replies for choice in said(reply)["choices"] for code in choice["codes"]}

    assert {2, 5} <= chosen()
    assert command("ban", bank, "2", "5") == "banned codes: 2, 5"
    assert not {2, 5} & chosen() and not {2, 5} & chosen(decode="token")
    assert chosen(allowed_codes=[2, 3]) == {3}
    assert refusal(service, model="formal", codes=[1, 5])[1] == "codes has 5, which is banned here for all"
    assert "leaves a row no code" in refusal(service, model="formal", allowed_codes=[2, 5])[1]
    command("ban", bank)
    assert {2, 5} <= chosen()


def test_the_service_follows_the_folder(bank: Path, run_of: RunOf) -> None:
    service = Service(bank, "bank")
    body = {"prompt": "3 5 7", "temperature": 1.0, "seed": 1, "n": 8}
    view = service.members.now()  # type: ignore[union-attr]
    under_way = view.blend("concise@1")
    before = said(ask_all(service, body | {"model": "concise@1"})[0])["choices"]
    banks.remove(bank, "concise@1")
    banks.add(bank, "new", find(run_of("new", 9)))
    assert refusal(service, model="concise@1")[0] == 404
    assert said(ask_all(service, body | {"model": "new"})[0])["model"] == "new@1"
    assert service.members is not None
    row = torch.randn(1, 32)
    old = load_policy(run_of("concise-1", 1) / "checkpoints" / "clone")
    torch.testing.assert_close(service.members.bank.logits(row, [under_way[1]]), old(row), rtol=0, atol=1e-5)
    banks.point(bank, "concise", "champion", "2")
    (bank / "members" / "formal@1.safetensors").write_bytes(b"damaged later: it is loaded already")
    banks.add(bank, "broken", find(run_of("new", 9)))
    (bank / "members" / "broken@1.safetensors").write_bytes(b"no weights")
    assert said(ask_all(service, body | {"model": "concise@champion"})[0])["model"] == "concise@2"
    assert refusal(service, model="broken")[:2] == (
        404,
        "broken@1 could not be read: the server's log says why; add it again",
    )
    assert said(ask_all(service, body | {"model": "formal"})[0])["choices"] != before
    (bank / "bank.json").write_text("half a file")
    assert said(ask_all(service, body | {"model": "new"})[0])["model"] == "new@1"


def test_one_model_has_no_mix(run_of: RunOf, tmp_path: Path) -> None:
    from pipeline.serving.export import export

    service = Service(export(find(run_of("first", 1)), tmp_path / "export"), "first")
    assert refusal(service, mix={"first": 1.0})[::2] == (400, "mix")


@contextmanager
def served(bank: Path) -> Iterator[Any]:
    """The ``openai`` client of a served bank."""
    import openai

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = replace(deploy.ServingSettings(folder=bank, name="bank"), port=port)
    deploy.check(settings)
    with deploy.running(settings) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


@needs_serve
@pytest.mark.slow
def test_the_openai_client_while_members_come_and_go(ray_session: None, bank: Path, run_of: RunOf) -> None:
    import openai

    def answer(client: Any, name: str, seed: int, **extra: Any) -> Any:
        body = {"prompt": "3 5 7", "max_tokens": 5, "temperature": 1.0, "seed": seed}
        return client.completions.create(model=name, extra_body=extra or None, **body)

    with served(bank) as client:
        assert {"concise", "concise@1", "formal"} <= {model.id for model in client.models.list().data}
        assert answer(client, "formal", 1).model == "formal@1"
        assert answer(client, "bank", 1, mix={"concise": 0.7, "formal": 0.3}).model == "concise@2*0.7+formal@1*0.3"
        with pytest.raises(openai.NotFoundError) as unknown:
            answer(client, "nobody", 1)
        assert "is not in the bank" in str(unknown.value)
        failed: list[str] = []
        ended = threading.Event()

        def ask(name: str) -> None:
            for seed in range(10**6):
                if ended.is_set():
                    return
                try:
                    answer(client, name, seed)
                except openai.OpenAIError as error:
                    failed.append(f"{name}: {error}")

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("concise", "formal", "concise@1")]
        for thread in threads:
            thread.start()
        try:
            for number in range(3):
                started = time.perf_counter()
                banks.add(bank, "extra", find(run_of(f"extra-{number}", 20 + number)))
                banks.point(bank, "concise", "latest", str(1 + number % 2))
                assert answer(client, "extra", 1).model == f"extra@{number + 1}"
                print("added and answering after", round(time.perf_counter() - started, 2), "s")
            banks.remove(bank, "extra")
            with pytest.raises(openai.NotFoundError):
                answer(client, "extra", 1)
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert failed == []


# -- MLflow ------------------------------------------------------------------------------------------------------------

READ_BACK = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
version = mlflow.MlflowClient().get_model_version("formal", "1")
folder = mlflow.artifacts.download_artifacts("models:/formal/1")
model = mlflow.pyfunc.load_model("models:/formal/1", model_config={"world": sys.argv[2]})
answer = model.predict([{"prompt": "3 5 7"}], params={"max_tokens": 6})
try:
    mlflow.pyfunc.load_model("models:/formal/1", model_config={"world": sys.argv[3]})
    refused = ""
except Exception as error:
    refused = str(error)
import latent_control
print(json.dumps({"tags": version.tags, "folder": folder, "codes": answer["codes"][0], "refused": refused,
                  "code": latent_control.__file__}))
"""


def test_a_member_is_a_small_model_version_that_names_its_bank(bank: Path, run_of: RunOf, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    said = command("add", bank, "formal", run_of("formal-7", 7), "--register", "formal", "--store", store)
    assert "formal@2 is formal@latest" in said and "models:/formal/1" in said
    other = banks.create(find(run_of("other", 1, world=9)), tmp_path / "other")
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    found = subprocess.run(
        [sys.executable, "-c", READ_BACK, store, bank / "world", other / "world"],
        cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    read = json.loads(found.stdout.splitlines()[-1])
    record = banks.read_record(bank, "formal@2")
    named = {"bank_world_hash": record["world_hash"], "bank_base_sha256": record["base_sha256"]}
    assert read["tags"] | named | {"sha256": record["sha256"], "member": "formal@2"} == read["tags"]
    files = [path for path in Path(read["folder"]).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6 and not [path for path in files if path.suffix == ".pkl"]
    assert "belongs to the bank whose world has" in read["refused"]
    assert Path(read["code"]).is_relative_to(tmp_path), "the code that travels, not this one"
    banks.take(bank, "formal@2", tmp_path / "taken")
    model = LatentActionLM.from_pretrained(tmp_path / "taken")
    tokens = load_tokenizer(str(bank / "world"))("3 5 7", return_tensors="pt").input_ids
    codes = model.generate(tokens, max_new_tokens=6, temperature=0.0).actions[0].tolist()
    assert read["codes"] == codes[: len(read["codes"])]
