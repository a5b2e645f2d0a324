"""``serve``: requests and replies, batches, streams, what is refused; once through Ray Serve, and the documentation's
examples."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from served import ask_all, raw_events, said
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.cli.options import USAGE
from pipeline.serving import deploy
from pipeline.serving.export import export, find
from pipeline.serving.service import Service
from rollout_workers.openai_api.text_stream import TextStream

pytest_plugins = ("rl_fixtures",)
DOCS = Path(__file__).resolve().parents[3] / "docs" / "serving.md"
needs_serve = pytest.mark.skipif(
    find_spec("grpc_reflection") is None, reason="Ray Serve is not installed: pip install -e '.[serve]'"
)


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(find(finished_run), tmp_path_factory.mktemp("export") / "first")


@pytest.fixture(scope="module")
def service(exported: Path) -> Service:
    return Service(exported, "first")


ask = said


def test_a_completion_is_what_the_engine_decodes(service: Service) -> None:
    reply = ask(service, prompt="3 5 7", model="first")
    ids = service.tokenizer("3 5 7", return_tensors="pt").input_ids
    wanted = service.latent.generate(ids, max_new_tokens=6, temperature=0.0)
    length = int(wanted.lengths[0])
    choice = reply["choices"][0]
    assert choice["token_ids"] == wanted.tokens[0, :length].tolist()
    assert choice["codes"] == wanted.actions[0, :length].tolist()
    torch.testing.assert_close(torch.tensor(choice["code_logprobs"]), wanted.action_logp[0, :length], atol=1e-5, rtol=0)
    assert choice["text"] == service.tokenizer.decode(wanted.tokens[0, :length], skip_special_tokens=True)
    assert choice["finish_reason"] == wanted.finish_reasons[0]
    assert (reply["object"], reply["model"]) == ("text_completion", "first")
    assert reply["usage"] == {"prompt_tokens": 4, "completion_tokens": length, "total_tokens": 4 + length}
    assert ask(service, prompt=ids[0].tolist())["choices"][0]["codes"] == choice["codes"]


def test_requests_share_batches_and_do_not_change_each_other(service: Service) -> None:
    bodies = [
        {"prompt": "3 5 7"},
        {"prompt": ["10", "1 2"], "temperature": 1.0, "seed": 3, "max_tokens": 4},
        {"prompt": "8 9", "codes": [3, None, 2]},
        {"prompt": "8 9", "allowed_codes": [1, 6], "temperature": 2.0, "seed": 1, "n": 3},
        {"prompt": "4", "temperature": 1.0, "top_k": 2, "seed": 9},
    ]
    together = ask_all(service, *bodies)
    for body, reply in zip(bodies, together, strict=True):
        assert isinstance(reply.body, dict)
        for here, there in zip(reply.body["choices"], ask(service, **body)["choices"], strict=True):
            # Other company in the batch, another order of additions: the last digit may differ.
            assert here.pop("code_logprobs") == pytest.approx(there.pop("code_logprobs"), abs=1e-5)
            assert here == there
    steered, masked = (together[i].body["choices"] for i in (2, 3))  # type: ignore[index]
    assert (steered[0]["codes"][0], steered[0]["codes"][2]) == (3, 2)
    assert {code for choice in masked for code in choice["codes"]} <= {1, 6}
    assert len({tuple(choice["codes"]) for choice in masked}) > 1
    assert [choice["index"] for choice in masked] == [0, 1, 2]


def test_each_prompt_may_have_its_own_codes(service: Service) -> None:
    reply = ask(service, prompt=["3", "4"], n=2, codes=[[5], None], allowed_codes=[None, [2]])
    codes = [choice["codes"] for choice in reply["choices"]]
    assert [row[0] for row in codes[:2]] == [5, 5]
    assert set(codes[2]) == set(codes[3]) == {2}


def test_a_stop_string_ends_the_text_before_it(service: Service) -> None:
    whole = ask(service, prompt="3 5 7", codes=[1, 2, 3, 4, 5, 6])["choices"][0]
    words = whole["text"].split(" ")
    stop = f" {words[2]}"
    out = ask(service, prompt="3 5 7", codes=[1, 2, 3, 4, 5, 6], stop=[stop, "never"])["choices"][0]
    assert out["text"] == whole["text"][: whole["text"].index(stop)]
    assert out["finish_reason"] == "stop"
    assert len(out["codes"]) < len(whole["codes"])


def events(service: Service, **body: Any) -> list[Any]:
    raw = raw_events(service, **body)
    assert raw[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in raw[:-1])
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in raw[:-2]]


def test_a_stream_says_the_same_piece_by_piece(service: Service) -> None:
    body = {"prompt": ["3 5 7", "10"], "temperature": 1.0, "seed": 2}
    whole, pieces = ask(service, **body)["choices"], events(service, **body)
    for index, choice in enumerate(whole):
        own = [piece for piece in pieces if piece["index"] == index]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [code for piece in own for code in piece["codes"]] == choice["codes"]
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert len(own) == len(choice["codes"]) + 1
    stop = whole[0]["text"][1:4]
    assert stop not in "".join(piece["text"] for piece in events(service, **body, stop=stop) if piece["index"] == 0)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_what_may_still_change_is_held_back() -> None:
    tokenizer = bytes_tokenizer()
    stream = TextStream(tokenizer, ["END"])
    shown = []
    for byte in tokenizer("aEN€ENDx")["input_ids"]:
        stream.push(byte)
        shown.append(stream.safe())
        if stream.stopped:
            break
    assert shown == ["a", "a", "a", "aEN", "aEN", "aEN€", "aEN€", "aEN€", "aEN€"]
    assert stream.text == "aEN€"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is not JSON"),
        ([1], 400, "the body is a JSON list; send an object"),
        ({}, 400, "prompt: Field required, got nothing"),
        ({"promt": "3"}, 400, 'promt: Extra inputs are not permitted, got "3"; known are model, max_tokens'),
        ({"prompt": "3", "max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1, got 0"),
        ({"prompt": "3", "max_tokens": "9"}, 400, "max_tokens: Input should be a valid integer"),
        ({"prompt": "3", "max_tokens": 5000}, 400, "are more than the model's 512 positions: shorten one of them"),
        ({"prompt": "3", "temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ({"prompt": "3", "suffix": "x"}, 400, 'suffix="x" is not supported: the model continues texts'),
        ({"prompt": "3", "model": "gpt"}, 404, "the model 'gpt' is not served here; 'first' is"),
        ({"prompt": "3", "codes": [8]}, 400, "codes has 8: the model's codes are 0 to 7"),
        ({"prompt": "3", "codes": [1.5]}, 400, "codes: Input should be a valid integer"),
        ({"prompt": "3", "codes": [[1], [2]]}, 400, "codes is given for 2 rows, but there are 1"),
        ({"prompt": "3", "allowed_codes": []}, 400, "allowed_codes is empty: allow at least one code"),
        (
            {"prompt": "3", "codes": [1], "allowed_codes": [2]},
            400,
            "codes forces code 1 at place 0, which allowed_codes leaves out",
        ),
        ({"prompt": []}, 400, "0 prompts x n=1 are 0 rows: send 1 to 128"),
        ({"prompt": ["3", "4"], "n": 65}, 400, "2 prompts x n=65 are 130 rows"),
        ({"prompt": [999]}, 400, "the prompt has the token 999: the model's are 0 to"),
        ({"prompt": "3", "stop": ["a", ""]}, 400, "none of them empty"),
    ],
)
def test_bad_requests_are_refused_with_the_value(service: Service, body: Any, status: int, message: str) -> None:
    reply = ask_all(service, body)[0]
    assert isinstance(reply.body, dict)
    assert (reply.status, reply.body["error"]["type"]) == (status, "invalid_request_error")
    assert message in reply.body["error"]["message"]


def test_other_paths_and_methods(service: Service) -> None:
    def status(method: str, path: str) -> tuple[int, Any]:
        reply = ask_all(service, b"", method=method, path=path)[0]
        return reply.status, reply.body

    assert status("GET", "/health") == (200, {"status": "ok", "rows": 0, "waiting": 0, "tokens": service.loop.tokens})
    assert status("GET", "/v1/models/")[1]["data"][0]["num_codes"] == 8
    assert status("GET", "/v1/completions")[0] == 405
    assert status("POST", "/v1/embeddings")[0] == 404


def test_chats_need_a_template(service: Service, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"messages": [{"role": "user", "content": "3 5"}], "max_completion_tokens": 3, "codes": [4]}
    refused = ask_all(service, body, path="/v1/chat/completions")[0]
    assert (refused.status, "has no chat template: use /v1/completions" in str(refused.body)) == (400, True)
    template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}7{% endif %}"
    monkeypatch.setattr(service.tokenizer, "chat_template", template)
    reply = ask_all(service, body, path="/v1/chat/completions")[0].body
    assert isinstance(reply, dict)
    plain = ask(service, prompt=service.tokenizer("3 5 7", add_special_tokens=False).input_ids, max_tokens=3, codes=[4])
    assert reply["object"] == "chat.completion"
    message = {"role": "assistant", "content": plain["choices"][0]["text"], "refusal": None}
    assert reply["choices"][0]["message"] == message
    assert reply["choices"][0]["codes"] == plain["choices"][0]["codes"]


def test_what_cannot_be_served_is_said_before_ray_starts(exported: Path, finished_run: Path, tmp_path: Path) -> None:
    def refused(*words: str | Path) -> str:
        result = CliRunner().invoke(app, ["serve", *map(str, words)])
        assert result.exit_code == USAGE, result.output
        return result.output

    assert "there is nothing at" in refused(tmp_path / "nothing")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused(exported, "--port", str(port))
    with pytest.raises(ValueError, match="is not an export; make one with latent-control export RUN"):
        deploy.check(deploy.ServingSettings(folder=finished_run, name="x"))


def test_who_can_connect_is_said() -> None:
    assert deploy.ServingSettings(folder=Path("x"), name="x").host == "127.0.0.1"
    for host in ("127.0.0.1", "localhost", "::1"):
        assert "this machine only" in deploy.reach(host)
    for host in ("0.0.0.0", "192.0.2.1", "example.org"):
        assert "no password and no encryption" in deploy.reach(host)


@needs_serve
@pytest.mark.slow
def test_ray_serve_answers(ray_session: None, exported: Path, service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = replace(deploy.ServingSettings(folder=exported, name="first"), port=port, batch_size=4)
    deploy.require_port(settings)
    deploy.check(settings)
    with deploy.running(settings) as address:
        assert address == f"http://127.0.0.1:{port}"

        def post(results: dict[int, Any], place: int, **body: Any) -> None:
            request = urllib.request.Request(f"{address}/v1/completions", data=json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=60) as answer:
                results[place] = answer.read().decode()

        bodies = [{"prompt": "3 5 7", "codes": [place, 2]} for place in range(4)]
        said: dict[int, str] = {}
        threads = [threading.Thread(target=post, args=(said, place), kwargs=body) for place, body in enumerate(bodies)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for place, body in enumerate(bodies):
            (here,), (there,) = ask(service, **body)["choices"], json.loads(said[place])["choices"]
            # Other company in the batch, another order of additions: the last digit may differ.
            assert there.pop("code_logprobs") == pytest.approx(here.pop("code_logprobs"), abs=1e-5)
            assert there == here
        post(said, 9, prompt="3", stream=True)
        assert said[9].endswith("data: [DONE]\n\n")
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(said, 10, prompt="3", codes=[99])
        assert refused.value.code == 400
        assert "codes has 99" in json.load(refused.value)["error"]["message"]
        a_hang_up_frees_its_rows(address, ended=service.ends)


def a_hang_up_frees_its_rows(address: str, ended: list[int]) -> None:
    """Four rows of 450 tokens that do not end by themselves: the client hangs up after some, and they leave."""

    def health() -> dict[str, Any]:
        with urllib.request.urlopen(f"{address}/health", timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    for stream in (True, False):
        before = health()["tokens"]
        asked = {"prompt": "3", "n": 4, "max_tokens": 450, "stream": stream}
        body = json.dumps(asked | {"logit_bias": {str(token): -100 for token in ended}}).encode()
        host, _, port = address.removeprefix("http://").partition(":")
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head + body)
            while health()["tokens"] < before + 8:
                pass
        while (now := health())["rows"]:
            pass
        assert now["tokens"] - before < 900, "half of what they would have become"


# -- docs/serving.md ---------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_documentation_run(
    finished_run: Path, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(finished_run.parent)
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    words = [shlex.split(line, comments=True) for line in lines]
    plain = [w[1:] for w in words if w[:2] == ["latent-control", "export"] and "--register" not in w]
    assert plain
    for command in plain:
        assert CliRunner().invoke(app, command).exit_code == 0, command
    requests = [w for w in words if w[0] == "curl"]
    assert len(requests) >= 3
    for command in requests:
        path = next(word for word in command if word.startswith("http")).partition("8000")[2]
        reply = ask_all(service, command[command.index("-d") + 1].encode(), path=path)[0]
        assert reply.status == 200, reply.body
    scripts = blocks("python")
    assert scripts
    for number, script in enumerate(scripts):
        if "mlflow" not in script:  # test_export.py loads a registered model
            (tmp_path / f"example{number}.py").write_text(script)
            runpy.run_path(f"example{number}.py")


def test_every_option_is_in_the_documentation() -> None:
    text = DOCS.read_text()
    for command in ("export", "serve"):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        options = set(re.findall(r"--[a-z][a-z-]+", re.sub(r"\x1b\[[0-9;]*m", "", shown))) - {"--help"}
        assert options
        assert not {option for option in options if option not in text}
