"""OpenAI's API by OpenAI's client against a real HTTP server: ordinary bodies are served, right, or refused by name."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the package openai is not installed")
pytest.importorskip("torch")

import openai
import torch
from openai.types import Model
from openai.types.chat import ChatCompletion
from served import listening
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs.schema import Architecture
from latent_control import LatentActionLM
from learners.base_training import new_model
from pipeline.serving.export import Source, export
from pipeline.serving.service import Service
from rollout_workers.openai_api.keys import key_digest
from rollout_workers.openai_api.tool_calls import call_schema

KEY = "sk-a-secret"
LAYERS = {"merge_layers": 1, "policy_layers": 1, "inverse_dynamics_layers": 1}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = (
    "{% set nl = '\n' %}{% if tools %}TOOLS {{ tools | tojson }}{{ nl }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %} CALL {{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}{{ nl }}"
    "{% endfor %}"
)
USER = {"role": "user", "content": "3 7"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, randomise: Any) -> Path:
    """A model over the bytes of ASCII, with a chat template; 16 codes that matter."""
    root = tmp_path_factory.mktemp("bytes")
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = [*special, *map(chr, range(33, 127)), "\u0120", "\u010a"]  # the last two are space and line break
    raw = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=2048,
    )
    tokenizer.chat_template = CHATML
    shape = Architecture(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        lm = new_model(shape, tokenizer)
    lm.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    model = LatentActionLM.from_base(root / "base", num_actions=16, seed=1, **LAYERS)
    randomise(model)
    model.codebook.data *= 4
    model.save_pretrained(root / "checkpoint")
    return export(Source(checkpoint=root / "checkpoint", run_dir=None), root / "export")


@pytest.fixture(scope="module")
def service(exported: Path) -> Service:
    return Service(exported, "it", device="cpu", slots=16, queue=16)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with listening(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def chat(client: Any, **body: Any) -> Any:
    asked = {"model": "it", "messages": [USER], "max_tokens": 6, "temperature": 0} | body
    return client.chat.completions.create(**asked)


def complete(client: Any, **body: Any) -> Any:
    return client.completions.create(**{"model": "it", "prompt": "3 7", "max_tokens": 6, "temperature": 0} | body)


def refusal(call: Any, client: Any, **body: Any) -> tuple[str, str | None]:
    with pytest.raises(openai.BadRequestError) as refused:
        call(client, **body)
    error = refused.value.body
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return error["message"], error["param"]


# -- bodies ------------------------------------------------------------------------------------------------------------

TAKEN: dict[str, dict[str, Any]] = {
    "no tools": {"tools": []},
    "tools": {"tools": [WEATHER]},
    "tools that are not called": {"tools": [WEATHER], "tool_choice": "none", "parallel_tool_calls": True},
    "one call at most": {"tools": [WEATHER], "tool_choice": "auto", "parallel_tool_calls": False},
    "parallel_tool_calls": {"parallel_tool_calls": True},
    "text": {"response_format": {"type": "text"}},
    "store": {"store": False},
    "tier": {"service_tier": "auto"},
    "labels": {"metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "3 7"}]}]},
    "hints": {"messages": [{"role": "user", "content": [{"type": "text", "text": "3 7", "cache_control": {}}]}]},
    "name": {"messages": [USER | {"name": "Ann"}]},
    "system": {"messages": [{"role": "system", "content": "be brief"}, USER]},
    "developer": {"messages": [{"role": "developer", "content": "be brief"}, USER]},
    "tool": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ]
    },
    "assistant without content": {"messages": [USER, {"role": "assistant", "content": None}, USER]},
    "seed and n": {"seed": -3, "n": 2, "temperature": 1},
    "top_p": {"top_p": 0.9, "temperature": 0.7},
    "top_p of greedy": {"top_p": 0.1},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "neutral": {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False},
    "bias": {"logit_bias": {"40": -100}},
    "stop": {"stop": ["x", "y"]},
    "new name of max_tokens": {"max_tokens": None, "max_completion_tokens": 4},
    "stop as null": {"stop": None, "seed": None, "n": None, "stream": None, "temperature": None, "user": None},
    "nulls": dict.fromkeys(
        ("tools", "tool_choice", "metadata", "response_format", "logprobs", "top_logprobs", "logit_bias", "store",
         "service_tier", "stream_options", "audio", "functions", "reasoning_effort")
    ),
    "verbosity": {"verbosity": "medium", "modalities": ["text"]},
    "ours": {"extra_body": {"min_p": 0.1, "return_token_ids": True, "allowed_codes": [1, 2]}, "temperature": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_an_ordinary_body_is_served(client: Any, name: str) -> None:
    reply = chat(client, **TAKEN[name])
    ChatCompletion.model_validate(reply.model_dump(), strict=False)
    choice = reply.choices[0]
    assert (reply.object, reply.model, choice.message.role, choice.message.refusal) == (
        "chat.completion", "it", "assistant", None,
    )  # fmt: skip
    assert isinstance(choice.message.content, str) and choice.finish_reason in ("stop", "length")
    assert len(reply.choices) == TAKEN[name].get("n", 1) or TAKEN[name].get("n") is None
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == sum(len(one.token_ids) for one in reply.choices)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "store": ({"store": True}, "store", "replies are not kept here"),
    "more rows than ever fit": ({"n": 33}, "n", "32 fit here at most"),
    "tier": ({"service_tier": "priority"}, "service_tier", "there is one tier"),
    "audio": ({"modalities": ["text", "audio"]}, "modalities", "replies are text"),
    "functions": ({"functions": [WEATHER["function"]]}, "functions", "send tools"),
    "effort": ({"reasoning_effort": "high"}, "reasoning_effort", "no such dial"),
    "search": ({"web_search_options": {}}, "web_search_options", "no web search"),
    "repetition": ({"extra_body": {"repetition_penalty": 1.2}}, "repetition_penalty", "scales logits"),
    "by code": ({"top_p": 0.5, "temperature": 1, "extra_body": {"decode": "code"}}, "top_p", "a meaning over tokens"),
    "codes and tokens": ({"top_p": 0.5, "temperature": 1, "extra_body": {"top_k": 3}}, "top_k", "beside top_p"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages", "part of type 'image_url': the model reads parts of type text",
    ),
    "part": ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages", "part of type 'file'"),
    "user without content": ({"messages": [{"role": "user", "content": None}]}, "messages", "content is missing"),
    "tool without id": ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "tool_call_id is missing"),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]}]},
        "messages", "not a JSON object",
    ),
    "kind of tool": ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools", "should be 'function'"),
    "choice without tools": ({"tool_choice": "required"}, "tool_choice", "names no function"),
    "unknown function": (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice", "names no function",
    ),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    "bias beyond the vocabulary": ({"logit_bias": {"999999": 1}}, "logit_bias", "the model's tokens are"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    "options without a stream": ({"stream_options": {"include_usage": True}}, "stream_options", "send stream=true"),
    "schema": ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
    "format beside tools": (
        {"response_format": {"type": "json_object"}, "tools": [WEATHER]}, "response_format", "beside tools",
    ),
    "unknown": ({"extra_body": {"beams": 3}}, "beams", "known are model"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(client: Any, name: str) -> None:
    body, param, words = REFUSED[name]
    message, found = refusal(chat, client, **body)
    assert found == param and words in message


def test_completions(client: Any) -> None:
    plain = complete(client)
    assert plain.object == "text_completion" and plain.choices[0].finish_reason in ("stop", "length")
    ids = list(b"3 7")  # what a byte-level tokenizer makes of it is not the bytes' numbers
    given = complete(client, extra_body={"return_token_ids": True}).choices[0].prompt_token_ids
    assert len(given) == len(ids)
    assert complete(client, prompt=given).choices[0].text == plain.choices[0].text
    both = complete(client, prompt=[given, given], n=2, seed=1, temperature=1)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3] and both.usage.prompt_tokens == 2 * len(given)
    assert complete(client, prompt=["3 7", "5"]).choices[0].text == plain.choices[0].text
    assert complete(client, best_of=2, n=2, seed=1).choices[1].index == 1
    assert refusal(complete, client, best_of=3) == ("best_of=3 is not supported: all n=1 rows are returned", "best_of")
    assert refusal(complete, client, max_tokens=0)[1] == "max_tokens"
    assert "suffix" in refusal(complete, client, suffix="x")[0]
    for logprobs in (0, True):
        found = complete(client, extra_body={"logprobs": logprobs}).choices[0].logprobs
        assert [list(top) for top in found.top_logprobs] == [[token] for token in found.tokens]


# -- log-probabilities -------------------------------------------------------------------------------------------------


def teacher_forced(service: Service, ids: list[int], start: int) -> torch.Tensor:
    """log sum_a pi(a) p(x | a) at the places of ``ids[start:]``, [T, V]: one pass of transformers' own base over all of
    it, then the formula of the paper, a code at a time."""
    model, given = service.latent, torch.tensor([ids])
    with torch.no_grad():
        out = model.base.lm.model(input_ids=given, output_hidden_states=True)
        final = out.last_hidden_state[0, start - 1 : -1]
        pi = model.policy_logits(model.features(given))[0, start - 1 : -1].softmax(-1)
        total = torch.zeros(len(final), model.base.lm.config.vocab_size)
        for code in range(model.config.num_actions):
            p = model.base.lm.lm_head(model.merge(final, model.codebook[code].expand_as(final))).softmax(-1)
            total += pi[:, code, None] * p
    return total.log()


@pytest.mark.parametrize("decode", ["code", "token"])
def test_log_probabilities_of_a_chat(client: Any, service: Service, decode: str) -> None:
    extra = {"decode": decode, "return_token_ids": True}
    reply = chat(client, logprobs=True, top_logprobs=3, temperature=1, seed=4, max_tokens=9, extra_body=extra)
    choice, content = reply.choices[0], reply.choices[0].logprobs.content
    wanted = teacher_forced(service, reply.prompt_token_ids + choice.token_ids, len(reply.prompt_token_ids))
    for place, entry in enumerate(content):
        assert entry.logprob == pytest.approx(float(wanted[place, choice.token_ids[place]]), abs=1e-4)
        likeliest = wanted[place].topk(3).values.tolist()
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(likeliest, abs=1e-4)
        assert entry.token == service.tokenizer.decode([choice.token_ids[place]])
    assert len(content) == len(choice.token_ids) - (choice.finish_reason == "stop")
    assert reply.decode == decode and len(choice.code_logprobs) == len(choice.token_ids)
    assert reply.choices[0].logprobs.refusal is None
    assert chat(client).choices[0].logprobs is None


def test_log_probabilities_of_a_prompt(client: Any, service: Service) -> None:
    """What harnesses ask for to score texts: ``echo`` with ``logprobs``, and one token or none behind."""
    for new in (0, 2):
        choice = complete(client, prompt="3 7 25", echo=True, logprobs=2, max_tokens=new,
                          extra_body={"return_token_ids": True}).choices[0]  # fmt: skip
        ids = choice.prompt_token_ids + choice.token_ids
        wanted, found = teacher_forced(service, ids, 1), choice.logprobs
        kept = len(found.tokens)
        assert kept == len(ids) and len(choice.token_ids) <= new  # the end token too, without text
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        own = [float(wanted[place, token]) for place, token in enumerate(ids[1:kept])]
        assert found.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
        for place, top in enumerate(found.top_logprobs[1:]):
            assert max(top.values()) == pytest.approx(float(wanted[place].max()), abs=1e-4)
            assert 2 <= len(top) <= 3
        assert choice.text.startswith("3 7 25") and "".join(found.tokens) == choice.text
        for offset, token in zip(found.text_offset, found.tokens, strict=True):
            assert choice.text[offset:].startswith(token)


def test_a_bare_echo(client: Any) -> None:
    assert complete(client, echo=True, max_tokens=0).choices[0].text == "3 7"
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == "3 7" + plain


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_chat_stream(client: Any) -> None:
    body = {"temperature": 1, "seed": 5, "max_tokens": 12, "n": 2, "logprobs": True}
    whole = chat(client, **body)
    chunks = list(chat(client, **body, stream=True, stream_options={"include_usage": True}))
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert [part.delta.role for part in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert [code for part in own for code in part.codes] == choice.codes
        logprobs = [entry.logprob for part in own if part.logprobs for entry in part.logprobs.content]
        assert logprobs == pytest.approx([entry.logprob for entry in choice.logprobs.content], abs=1e-5)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_completion_stream_with_its_prompt(client: Any) -> None:
    body = {"prompt": ["3 7", "5"], "echo": True, "logprobs": 1, "temperature": 1, "seed": 2}
    whole, chunks = complete(client, **body), list(complete(client, **body, stream=True))
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(part.text for part in own) == choice.text
        found = [token for part in own if part.logprobs for token in part.logprobs.tokens]
        assert found == choice.logprobs.tokens
        offsets = [offset for part in own if part.logprobs for offset in part.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset


def test_a_stream_ends_as_the_protocol_says(address: str) -> None:
    body = json.dumps({"messages": [USER], "max_tokens": 3, "stream": True}).encode()
    with urllib.request.urlopen(f"{address}/v1/chat/completions", data=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: {") for line in lines[:-2])


# -- templates, tools --------------------------------------------------------------------------------------------------


def prompt_of(client: Any, service: Service, **body: Any) -> str:
    ids = chat(client, max_tokens=1, extra_body={"return_token_ids": True}, **body).prompt_token_ids
    return str(service.tokenizer.decode(ids))


def test_messages_reach_the_template(client: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    monkeypatch.setattr(service.tokenizer, "chat_template", WITH_TOOLS)
    own = prompt_of(client, service, messages=talk, tools=[WEATHER])
    head, *rest = own.split("\n")
    assert json.loads(head.removeprefix("TOOLS ")) == [WEATHER]
    assert rest[:5] == ["system: be", "brief", "user: rain?", "assistant:  CALL weather Bonn", "tool: sunny"]
    monkeypatch.setattr(service.tokenizer, "chat_template", CHATML)
    told = prompt_of(client, service, messages=talk, tools=[WEATHER])
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>' in told
    assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>" in told
    assert told.startswith("<|im_start|>system\nbe\nbrief\n\n# Tools\n") and json.dumps(WEATHER) in told
    unasked = prompt_of(client, service, messages=talk[:2], tools=[WEATHER], tool_choice="none")
    assert "Tools" not in unasked


def writes(service: Service, monkeypatch: pytest.MonkeyPatch, text: str | Callable[[str], str]) -> None:
    """The model says ``text``, or what that makes of the prompt: its next token is the text's, whatever the code."""

    def ids(prompt: tuple[int, ...]) -> list[int]:
        words = text if isinstance(text, str) else text(service.tokenizer.decode(prompt))
        return [*service.tokenizer(words, add_special_tokens=False).input_ids, service.ends[0]]

    chooser = service.loop.engine.chooser
    inner = chooser.choose

    def choose(rows: Any, *rest: Any) -> Any:
        chosen = inner(rows, *rest)
        chosen.tokens[:] = [ids(row.params.prompt)[len(row.tokens)] for row in rows]
        chosen.complete[:] = [False] * len(rows)
        return chosen

    monkeypatch.setattr(chooser, "choose", choose)


CALLS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "cities", "settings"),
    [
        (f"I look. {CALLS}{CALLS}", "I look.", ["Ulm", "Ulm"], {}),
        (f"{CALLS}{CALLS}", None, ["Ulm"], {"parallel_tool_calls": False}),
        ('{"name": "weather", "parameters": {"city": "Ulm"}}', None, ["Ulm"], {}),
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}}]', None, ["Ulm"], {}),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', "all", [], {}),
        ("<tool_call>no JSON</tool_call>", "all", [], {}),
        ('{"name": "Ann"}', "all", [], {}),
        ('{"name": "weather", "arguments": {"city": "\\ud800"}}', "all", [], {}),
        ('{"name": "weather", "arguments": {"city": NaN}}', "all", [], {}),
        ("a < b", "all", [], {}),
    ],
)
def test_calls_that_the_model_writes(
    client: Any, service: Service, monkeypatch: pytest.MonkeyPatch,
    text: str, content: str | None, cities: list[str], settings: dict[str, Any],
) -> None:  # fmt: skip
    writes(service, monkeypatch, text)
    body = {"tools": [WEATHER], "max_tokens": 200} | settings
    choice = chat(client, **body).choices[0]
    wanted = text if content == "all" else content
    calls = choice.message.tool_calls or []
    assert choice.message.content == wanted and choice.finish_reason == ("tool_calls" if cities else "stop")
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": city} for city in cities]
    assert len({call.id for call in calls}) == len(cities)
    parts = [chunk.choices[0] for chunk in chat(client, **body, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == (wanted or "")
    streamed = [call for part in parts for call in part.delta.tool_calls or []]
    assert [call.index for call in streamed] == list(range(len(cities)))
    assert [json.loads(call.function.arguments)["city"] for call in streamed] == cities
    assert parts[-1].finish_reason == choice.finish_reason
    assert chat(client, **body | {"tool_choice": "none"}).choices[0].message.tool_calls is None


@pytest.mark.slow
def test_the_agents_sdk_plays_a_task_with_two_tools(
    service: Service, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``AGENTS_PYTHON`` names the interpreter of an environment with ``openai-agents``. What the model writes is
    scripted: a call, another one with the first one's result, and the second one's result in words."""
    python = os.environ.get("AGENTS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import agents"], capture_output=True, check=False).returncode:
        pytest.skip("the package openai-agents is not installed (AGENTS_PYTHON names another environment's Python)")

    def wanted(prompt: str) -> str:
        results = re.findall("<tool_response>\n(.*)\n</tool_response>", prompt)
        if len(results) == 2:
            return f"It is {results[1]}."
        name, given = ("times", {"a": int(results[0]), "b": 4}) if results else ("add", {"a": 2, "b": 3})
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': given})}\n</tool_call>"

    writes(service, monkeypatch, wanted)
    script = Path(__file__).parents[2] / "support" / "agent_with_two_tools.py"
    found = os.environ | {"OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": "none"}
    done = subprocess.run([python, str(script)], env=found, capture_output=True, text=True, check=False, timeout=500)
    assert done.stdout.strip() == "It is 20.", done.stderr


# -- grammars ----------------------------------------------------------------------------------------------------------

needs_llguidance = pytest.mark.usefixtures("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "b"]}},
    "required": ["n", "kind"],
    "additionalProperties": False,
}


@pytest.fixture
def llguidance() -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install -e '.[serve]'")


@needs_llguidance
@pytest.mark.parametrize("decode", ["code", "token"])
def test_a_schema_is_held_to(client: Any, decode: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for seed in range(4):
        choice = chat(client, response_format=form, temperature=1, seed=seed, max_tokens=80,
                      extra_body={"decode": decode}).choices[0]  # fmt: skip
        if choice.finish_reason == "stop":
            found = json.loads(choice.message.content)
            assert set(found) == {"n", "kind"} and 0 <= found["n"] <= 99 and found["kind"] in ("a", "b")
        assert len(choice.grammar_codes_left) == len(choice.codes)
        if decode == "code":
            assert all(1 <= left <= 16 for left in choice.grammar_codes_left)
    assert not hasattr(chat(client).choices[0], "grammar_codes_left")


@needs_llguidance
def test_json_objects_and_required_calls(client: Any, service: Service) -> None:
    form, closes = {"type": "json_object"}, service.tokenizer.convert_tokens_to_ids("}")
    for seed in range(3):
        choice = chat(client, response_format=form, temperature=1, seed=seed, max_tokens=40).choices[0]
        assert choice.message.content.lstrip().startswith("{")
    short = chat(client, response_format=form, logit_bias={str(closes): 100}, max_tokens=40).choices[0]
    assert (json.loads(short.message.content), short.finish_reason) == ({}, "stop")
    for wanted in ("required", {"type": "function", "function": {"name": "weather"}}):
        choice = chat(client, tools=[WEATHER], tool_choice=wanted, max_tokens=200, temperature=1, seed=1).choices[0]
        (call,) = choice.message.tool_calls
        assert call.function.name == "weather" and set(json.loads(call.function.arguments)) == {"city"}
        assert choice.finish_reason == ("tool_calls" if wanted == "required" else "stop")


@needs_llguidance
@pytest.mark.parametrize("strict", [True, False])
def test_tools_of_nested_models_are_held_to(client: Any, strict: bool) -> None:
    """As pydantic writes them: definitions beside the properties, and references to them."""
    place = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    own = {"at": {"$ref": "#/$defs/P"}, "up": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}
    schema = {"type": "object", "properties": own, "required": ["at"], "$defs": {"P": place}}
    tools = [WEATHER, {"type": "function", "function": {"name": "go", "parameters": schema, "strict": strict}}]
    wanted = "auto" if strict else {"type": "function", "function": {"name": "go"}}
    reply = chat(client, tools=tools, tool_choice=wanted, max_tokens=300, temperature=1, seed=3).choices[0]
    assert reply.grammar_codes_left
    for call in reply.message.tool_calls or []:
        assert isinstance(json.loads(call.function.arguments)["at"]["n"], int)
    assert strict or reply.message.tool_calls or reply.finish_reason == "length"


@needs_llguidance
def test_strict_functions_bind_calls_alone(client: Any, service: Service) -> None:
    strict = WEATHER | {"function": WEATHER["function"] | {"strict": True}}
    assert chat(client, tools=[strict], temperature=1, seed=1).choices[0].grammar_codes_left
    schema = call_schema([strict["function"]])

    def allowed_after(text: str) -> set[str]:
        grammar = service.reader.grammars.calls(schema, "<tool_call>", "</tool_call>", "tools")
        for token in service.tokenizer(text, add_special_tokens=False).input_ids:
            assert bool(grammar.allowed()[token]), (text, token)
            grammar.take(token)
        tokens = grammar.allowed().nonzero().flatten().tolist()
        return {"end" if token in service.ends else service.tokenizer.decode([token]) for token in tokens}

    assert {"a", "<", "{", "end"} <= allowed_after("words, {and} <tool")
    inside = '<tool_call>\n{"name": "weather", "arguments": {"city": "'
    assert allowed_after("words <tool_call>\n") <= {"{"} and "end" not in allowed_after(inside)
    assert '"' in allowed_after(inside + "Bonn") and "x" not in allowed_after(inside + "Koeln"), "5 letters at most"
    assert {"a", "end"} <= allowed_after(inside + 'Ulm"}}\n</tool_call>')


@needs_llguidance
def test_grammars_that_cannot_be(client: Any, service: Service) -> None:
    def said(schema: Any) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        message, param = refusal(chat, client, response_format=form)
        assert param == "response_format"
        return message

    assert "cannot be held to" in said({"type": "nonsense"})
    assert "cannot be held to" in said({"$ref": "http://127.0.0.1/x"})


# -- errors, keys, models ----------------------------------------------------------------------------------------------


def raw(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, Any]:
    request = urllib.request.Request(f"{address}{path}", method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def test_errors_have_one_form(address: str, client: Any) -> None:
    for path, method, status in (
        ("/v1/embeddings", "POST", 404), ("/", "GET", 404), ("/v1", "GET", 404), ("/v1/chat/completions", "GET", 405),
        ("/v1/models", "DELETE", 405), ("/v1/completions", "OPTIONS", 405), ("/v1/models/nobody", "GET", 404),
        ("/v1/completions", "PUT", 405),
    ):  # fmt: skip
        found, body, headers = raw(address, path, method)
        assert found == status and set(body["error"]) == {"message", "type", "param", "code"}, (path, method)
        assert body["error"]["type"] == "invalid_request_error" and "access-control-allow-origin" not in headers
    with pytest.raises(openai.NotFoundError) as unknown:
        chat(client, model="gpt-4")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        complete(client, prompt="3 " * 1024, max_tokens=2048)
    assert long.value.code == "context_length_exceeded"


def test_models(address: str, client: Any) -> None:
    (model,) = client.models.list().data
    assert Model.model_validate(model.model_dump()).id == "it" and model.owned_by == "latent-control"
    assert client.models.retrieve("it") == model and model.num_codes == 16
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_key_is_needed_where_there_is_one(service: Service, caplog: Any, capfd: Any) -> None:
    with listening(service, key=key_digest(KEY)) as address:
        good = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        assert complete(good).choices
        for wrong in ("sk-another", KEY[:-1], KEY + "x"):
            with pytest.raises(openai.AuthenticationError) as refused:
                complete(openai.OpenAI(base_url=f"{address}/v1", api_key=wrong, max_retries=0))
            assert refused.value.code == "invalid_api_key" and wrong not in str(refused.value)
        status, body, headers = raw(address, "/v1/models")
        assert (status, body["error"]["code"]) == (401, "invalid_api_key") and headers["www-authenticate"] == "Bearer"
        assert raw(address, "/v1/models", authorization=f"Basic {KEY}")[0] == 401
        assert raw(address, "/nowhere")[0] == 401 and raw(address, "/health")[0] == 200
    shown = capfd.readouterr()
    assert KEY not in caplog.text + shown.out + shown.err


def test_a_failure_of_the_server_is_an_error_of_openai_s(
    service: Service, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(service.loop.engine.chooser, "choose", broken)
    with pytest.raises(openai.InternalServerError) as failed:
        chat(client)
    assert failed.value.body["type"] == "server_error" and "no memory" not in str(failed.value)
    assert chat(client).choices, "the next request gets a new engine"
    monkeypatch.setattr(service.loop.engine.chooser, "choose", broken)
    with pytest.raises(openai.APIError):
        list(chat(client, stream=True))
    monkeypatch.setattr(service.reader, "read", broken)
    with pytest.raises(openai.InternalServerError) as failed:
        chat(client)
    assert failed.value.body["type"] == "server_error"


# -- many at once ------------------------------------------------------------------------------------------------------


def eventually(true: Any, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def forever(**body: Any) -> dict[str, Any]:
    """A row that does not end by itself: no end token, until the last position."""
    return {"max_tokens": 1800, "temperature": 1, "logit_bias": {"2": -100}} | body


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_row(service: Service, client: Any, address: str, stream: bool) -> None:
    eventually(lambda: service.loop.state()["rows"] == 0)
    host, _, port = address.removeprefix("http://").partition(":")
    body = json.dumps(forever(prompt="3", stream=stream)).encode()
    with socket.create_connection((host, int(port))) as hung:
        hung.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: service.loop.state()["rows"] == 1 and service.loop.tokens > 3)
    eventually(lambda: service.loop.state()["rows"] == 0, seconds=3)
    assert not service.loop.jobs and not service.loop.engine.rows
    assert complete(client).choices


def test_too_many_are_told_to_come_later(service: Service, client: Any, address: str) -> None:
    """16 rows and 16 waiting: the next request is refused at once, with a time; a client that retries is served."""
    streams = [client.completions.create(**forever(model="it", prompt="3", n=16, stream=True)) for _ in range(2)]
    try:
        eventually(lambda: service.loop.state() | {"tokens": 0} == {"rows": 16, "waiting": 16, "tokens": 0})
        with pytest.raises(openai.RateLimitError) as full:
            complete(client)
        assert (full.value.code, full.value.body["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
        patient = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=8)
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda: answers.append(complete(patient)))
        waiting.start()
    finally:
        for stream in streams:
            stream.close()
    waiting.join(90)
    assert answers and answers[0].choices


def test_a_slow_client_holds_nobody_up(client: Any, service: Service) -> None:
    slow = client.completions.create(**forever(model="it", prompt="3", max_tokens=250, n=8, stream=True))
    next(iter(slow))  # and reads no further
    begun = time.monotonic()
    assert [complete(client, prompt=str(number)).choices for number in range(5)]
    assert time.monotonic() - begun < 20
    eventually(lambda: service.loop.state()["rows"] == 0, seconds=60)
    assert sum(len(chunk.choices[0].token_ids) for chunk in slow) > 1900, "what it did not read has waited for it"


def test_prompts_are_kept_over_requests(client: Any, service: Service) -> None:
    text = "the same long beginning of many prompts, " * 4
    complete(client, prompt=text + "a")
    before = service.tree.computed
    complete(client, prompt=text + "b")
    assert service.tree.computed - before <= 2
