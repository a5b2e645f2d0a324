"""Requests that no client should send: refused in OpenAI's form by the argument's name, in bounded time and memory,
while others are answered. The oracle is the protocol: a status of 400 to 499, or an answer."""

from __future__ import annotations

import asyncio
import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from pipeline.serving.export import export, find
from pipeline.serving.service import Service
from pipeline.serving.web import LARGEST_BODY, answer
from pipeline.steering.request import SteeringRequest, codes_of
from pipeline.steering.steerer import Steerer
from pipeline.steering.web import application

pytest_plugins = ("rl_fixtures", "explorer_fixtures", "steering_fixtures")
DIGITS = "9" * 400
GOOD: dict[str, Any] = {"prompt": "3 7 25 -> 29 :", "max_tokens": 3}
TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}{{ m.content }} "
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def service(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    made = Service(export(find(finished_run), tmp_path_factory.mktemp("export") / "first"), "first", device="cpu")
    made.tokenizer.chat_template = TEMPLATE
    return made


def scope(path: str, *headers: tuple[str, str]) -> dict[str, Any]:
    raw = [(name.encode(), value.encode()) for name, value in (("content-type", "application/json"), *headers)]
    about = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": raw}
    return about | {"query_string": b"", "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 9)}


class Client:
    """Speaks ASGI: what was read of the body, and the reply."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks, self.read, self.status, self.reply = chunks, 0, 0, b""
        self.ended = False

    async def receive(self) -> dict[str, Any]:
        chunk = next(self.chunks, None)
        if chunk is None and self.ended:
            await asyncio.Event().wait()  # the client stays, and says no more
        self.ended, self.read = chunk is None, self.read + len(chunk or b"")
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    async def send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.reply += message.get("body", b"")

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.reply)["error"]
        return found


async def post(service: Service, body: Any, path: str = "/v1/completions") -> Client:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    client = Client(iter([raw]))
    about = scope(path)

    await (await answer(service, Request(about, client.receive)))(about, client.receive, client.send)
    return client


def spelled(name: str, text: str) -> bytes:
    """The good request with ``name`` set to JSON text as it stands."""
    return json.dumps({key: value for key, value in GOOD.items() if key != name})[:-1].encode() + (
        f', "{name}": {text}}}'.encode()
    )


def of_all(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


CASES: dict[str, tuple[bytes, str | None]] = {
    "a tiny temperature": (of_all(temperature=1e-40), "temperature"),
    "a denormal temperature": (of_all(temperature=5e-324), "temperature"),
    "a negative temperature": (of_all(temperature=-1), "temperature"),
    "a temperature of 400 digits": (spelled("temperature", DIGITS), "temperature"),
    "a temperature of 5000 digits": (spelled("temperature", "9" * 5000), "temperature"),
    **{f"temperature {word}": (spelled("temperature", word), "temperature") for word in ("NaN", "Infinity", "1e999")},
    **{f"{name} of 400 digits": (spelled(name, DIGITS), name) for name in ("max_tokens", "n", "seed", "top_k")},
    **{
        f"{name} of 5000 digits": (spelled(name, "-" + "9" * 5000), name)
        for name in ("max_tokens", "n", "seed", "top_k")
    },
    "codes of 400 digits": (spelled("codes", f"[{DIGITS}]"), "codes"),
    "a token of 400 digits": (spelled("prompt", f"[{DIGITS}]"), "prompt"),
    "a seed beyond 64 bits": (of_all(seed=2**64), "seed"),
    "a huge n": (of_all(n=10**9), "n"),
    "huge max_tokens": (of_all(max_tokens=10**9), "max_tokens"),
    "half a character": (spelled("prompt", r'"\ud800 3"'), "prompt"),
    "half a character in a list": (spelled("prompt", r'["3", "\udfff"]'), "prompt"),
    "half a character in stop": (spelled("stop", r'["a", "\udc80"]'), "stop"),
    "half a character in user": (spelled("user", r'"\ud83d"'), "user"),
    "half a character in model": (spelled("model", r'"\ud83d"'), "model"),
    "half a character in an argument": (spelled(r"\ud83d", "1"), "?"),
    "half a character as bytes": (spelled("prompt", '"~"').replace(b"~", b"\xed\xa0\x80"), "prompt"),
    "10,000 long stop strings": (of_all(stop=["x" * 400] * 10_000), "stop"),
    "one long stop string": (of_all(stop="x" * 1_000_000), "stop"),
    "100,000 codes for 128 rows": (of_all(codes=[1] * 100_000, n=128), "codes"),
    "100,000 codes for each of 128 rows": (of_all(codes=[[1] * 10_000] * 128, n=128), "codes"),
    "100,000 allowed codes": (of_all(allowed_codes=[1] * 100_000, n=128), "allowed_codes"),
    "100,000 rows of codes": (of_all(codes=[[1]] * 100_000), "codes"),
    "a million wrong codes": (of_all(codes=[1.5] * 1_000_000), "codes"),
    "a prompt of 2 MB": (of_all(prompt="3 7 " * 500_000), "prompt"),
    "a million prompts": (of_all(prompt=["3"] * 1_000_000), "prompt"),
    "a million wrong prompts": (of_all(prompt=[None] * 1_000_000), "prompt"),
    "a million tokens": (of_all(prompt=[3] * 1_000_000), "max_tokens"),
    "an argument of a megabyte": (of_all(**{"x" * 1_000_000: 1}), "x" * 80),
    "a model of a megabyte": (of_all(model="x" * 1_000_000), "model"),
    "100,000 arguments": (of_all(**{f"a{i}": i for i in range(100_000)}), "a0"),
    "a key twice": (b'{"prompt": "3", "n": 1, "n": 2}', "n"),
    "deep JSON": (b"[" * 1_000_000, None),
    "deep objects": (spelled("prompt", '{"a":' * 100_000 + "1" + "}" * 100_000), None),
    "deep neutral": (spelled("logit_bias", "[" * 900 + "]" * 900), "logit_bias"),
    "no UTF-8": (b'{"prompt": "\xff"}', None),
    "nothing": (b"", None),
    "a number": (b"1", None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_request_is_refused_by_the_arguments_name(service: Service, name: str) -> None:
    body, param = CASES[name]
    begun = time.process_time()  # others may be at work on this machine
    client = asyncio.run(post(service, body))
    assert 400 <= client.status < 500 and client.error["type"] == "invalid_request_error"
    assert client.error["param"] == param and len(client.reply) < 8000
    assert (param or "") in client.error["message"] and time.process_time() - begun < 5


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "\ud800"}], "half of a character"),
        ([{"role": "system", "content": "3"}], "users only"),
        ([{"role": "thief", "content": "3"}], "messages.0.role"),
        ([{"role": "user", "content": "3 " * 1_000_000}], "bytes"),
        ([{"role": "user", "content": "3"}] * 200_000, "at most 2048"),
        ([{"role": 1}] * 200_000, "messages.0.role"),
        ([], "at least 1"),
        *(
            (
                [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": given}}]}],
                "not a JSON object",
            )
            for given in (r'{"a": "\ud800"}', '{"a": NaN}', '{"a": 1e999}', "[" * 5000)
        ),
    ],
)
def test_hostile_conversations_are_refused(service: Service, messages: Any, words: str) -> None:
    client = asyncio.run(post(service, {"messages": messages, "max_tokens": 2}, "/v1/chat/completions"))
    assert client.status == 400 and client.error["param"] == "messages" and words in client.error["message"]
    good = {"messages": [{"role": "user", "content": "3 7"}], "max_tokens": 2}
    assert asyncio.run(post(service, good, "/v1/chat/completions")).status == 200


def test_codes_beyond_any_model_make_no_tensors(service: Service) -> None:
    body = of_all(codes=[1] * 100_000, n=128)
    tracemalloc.start()
    asyncio.run(post(service, body))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20 << 20  # 128 rows of 100,000 numbers would be 102 MB


@pytest.mark.parametrize("headers", [(), (("content-length", "5"), ("transfer-encoding", "chunked"))])
def test_a_body_without_end_is_read_up_to_the_bound(
    service: Service, steerer: Steerer, headers: Sequence[tuple[str, str]]
) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 65536

    async def both() -> tuple[Client, Client]:
        served, steered = Client(endless()), Client(endless())
        about = scope("/v1/completions", *headers)
        await (await answer(service, Request(about, served.receive)))(about, served.receive, served.send)
        about = scope("/token/api/answer", ("host", "127.0.0.1"), *headers)
        await application(steerer, "127.0.0.1", "token")(about, steered.receive, steered.send)
        return served, steered

    served, steered = asyncio.run(both())
    assert served.status == 413 and served.read <= LARGEST_BODY + 65536 and "bytes" in served.error["message"]
    assert steered.status == (413 if headers else 411) and steered.read <= 3 * 65536


def test_a_client_that_hangs_up_within_its_body_is_no_failure(service: Service) -> None:
    client = Client(iter(()))

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    about = scope("/v1/completions")
    asyncio.run(call(service, about, receive, client))
    assert client.status == 499


async def call(service: Service, about: dict[str, Any], receive: Any, client: Client) -> None:
    await (await answer(service, Request(about, receive)))(about, receive, client.send)


def test_others_are_answered_while_a_long_text_is_read(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that takes a second for one text: health checks are answered within it."""

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *arguments: Any, **named: Any) -> Any:
            time.sleep(0.5)
            return tokenizer(*arguments, **named)

    tokenizer = service.tokenizer
    monkeypatch.setattr(service, "tokenizer", Slow())

    async def waits() -> list[float]:
        long = asyncio.create_task(post(service, GOOD))
        found = []
        while not long.done():
            begun = time.monotonic()
            await asyncio.sleep(0.01)
            found.append(time.monotonic() - begun)
        assert long.result().status == 200
        return found

    assert max(asyncio.run(waits())) < 0.4


def mutated(rng: random.Random) -> tuple[bytes, str]:
    """A valid request with one to three random changes."""
    odd: list[Callable[[], Any]] = [
        *(lambda v=v: v for v in (None, True, False, [], {}, "", "\x00", "\ud800", "٣", 0, -1, 1, 10**30, -(10**400))),
        *(lambda v=v: v for v in (1e-40, 1e308, float("nan"), float("inf"), -0.0, 0.5, [[]], [None], [[None]], [""])),
        lambda: [rng.randint(-3, 60) for _ in range(rng.randint(0, 40))],
        lambda: [[rng.randint(-3, 60)] * rng.randint(0, 9) for _ in range(rng.randint(0, 4))],
        lambda: "".join(chr(rng.randrange(0x3000)) for _ in range(rng.randint(0, 300))),
        lambda: [{"role": rng.choice(["user", "system", "\udc00"]), "content": rng.choice(["3", None, 5])}],
    ]
    chat = rng.random() < 0.3
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "3 7"}], "max_tokens": 2} if chat else dict(GOOD)
    names = ["prompt", "messages", "max_tokens", "temperature", "top_k", "n", "seed", "stop", "codes", "allowed_codes"]
    names += ["model", "decode", "user", "top_p", "logit_bias", "logprobs", "best_of", "echo", "suffix", "x\ud800"]
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(names)] = rng.choice(odd)()
    raw = json.dumps(body).encode()
    if rng.random() < 0.2:
        place = rng.randrange(len(raw))
        raw = (
            raw[:place] + rng.choice([b"", b"\xff", b'"', b"[", b"\x00", b"9" * 50]) + raw[place + rng.randint(0, 3) :]
        )
    return raw, "/v1/chat/completions" if chat else "/v1/completions"


def test_no_mutation_of_a_request_is_an_error_of_the_server(service: Service) -> None:
    async def all_of_them() -> list[tuple[int, bytes]]:
        rng = random.Random(4)
        return [((await post(service, raw, path)).status, raw) for raw, path in (mutated(rng) for _ in range(600))]

    statuses = asyncio.run(all_of_them())
    assert [found for found in statuses if not 200 <= found[0] < 500] == []
    assert {200, 400} <= {status for status, _ in statuses}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"forbidden_at": {10**12: [1]}}, "forbidden_at"),
        ({"forbidden_at": {-1: [1]}}, "forbidden_at"),
        ({"forbidden_at": {"9" * 400: [1]}}, "forbidden_at"),
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "3 " * 20_000}, "prompt"),
        ({"codes": [1] * 20_000}, "codes"),
        ({"codes": [10**400]}, "codes"),
        ({"allowed_codes": list(range(20_000)), "forbidden_codes": list(range(8))}, "allowed_codes"),
        ({"forbidden_codes": [0] * 20_000 + list(range(8)), "allowed_codes": [0, 1] * 10_000}, "forbidden_codes"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"place": 10**400}, "place"),
    ],
)
def test_hostile_steering_is_refused(steerer: Steerer, changes: dict[str, Any], param: str) -> None:
    body = json.dumps({"prompt": "3 7", "place": 0} | changes).encode()
    client, length = Client(iter([body])), str(len(body))
    about = scope("/token/api/candidates", ("host", "127.0.0.1"), ("content-length", length))
    begun = time.monotonic()
    asyncio.run(application(steerer, "127.0.0.1", "token")(about, client.receive, client.send))
    assert client.status == 400 and client.error["param"] == param and time.monotonic() - begun < 5


def test_steering_keeps_codes_of_tokens_that_are_not_written(steerer: Steerer) -> None:
    long, short = (steerer.answer(SteeringRequest(prompt="3 7", codes=[1, 2, 3], max_tokens=n)) for n in (3, 1))
    assert [token.code for token in short.tokens] == [token.code for token in long.tokens][:1]


def test_a_line_of_the_terminal_does_not_become_a_billion_codes() -> None:
    assert len(codes_of("0-49999,0-49999", ":only")) == 100_000
    with pytest.raises(ValueError, match="0-99999"):
        codes_of(",".join(["0-99999"] * 10_000), ":only")


def test_hostile_parameters_of_the_mlflow_model_are_refused(finished_run: Path, tmp_path: Path) -> None:
    from pipeline.serving.mlflow_model import LatentModel

    model = LatentModel()
    folder = export(find(finished_run), tmp_path / "export")
    model.load_context(SimpleNamespace(artifacts={"export": str(folder)}))
    for params in (
        *({"temperature": value} for value in (float("nan"), float("inf"), -1.0, 1e-40)),
        *({"max_tokens": value} for value in (10**9, -5)),
    ):
        with pytest.raises(ValueError, match=next(iter(params))):
            model.predict(None, {"prompt": ["3 7"]}, params)
    with pytest.raises(ValueError, match="512 positions"):
        model.predict(None, {"prompt": ["3 7 " * 1000]}, {})
    assert len(model.predict(None, {"prompt": ["3 7"]}, {"max_tokens": 2})) == 1
    free, forced = (
        model.predict(None, {"prompt": ["3 7", "3 7"], "codes": [[1], codes]}, {"max_tokens": 2})["codes"]
        for codes in (float("nan"), [2.0])  # as pandas reads a gap, and whole numbers beside one
    )
    assert free[0][0] == forced[0][0] == 1 and forced[1][0] == 2
    for codes in ([1.5], "12", [True], 3, ["1"]):
        with pytest.raises(ValueError, match="give a list of whole numbers per row, or null"):
            model.predict(None, {"prompt": ["3 7"], "codes": [codes]}, {})
    assert list(model.predict(None, {"prompt": []}, {})) == ["text", "codes", "finish_reason"]
    model.tokenizer.backend_tokenizer.post_processor = None  # which puts a token in front
    with pytest.raises(ValueError, match="prompt '' has no tokens: send some text"):
        model.predict(None, {"prompt": ["3 7", ""]}, {})
