"""An agent program with one of the faults (or ways) that its first argument names."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from typing import Any

from gateway_client import Refused, post, reward

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def asked(content: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": content}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The message of a reply."""
    return post("chat/completions", messages=list(messages), **more)["choices"][0]["message"]


def rewrite() -> None:
    chat(asked("room 1"))
    chat(asked("room 1"), {"role": "assistant", "content": "never said"}, asked("room 2"))
    reward(1.0, success=True)


def retokenise() -> None:
    post("completions", prompt="room 1 >")
    post("completions", prompt="room 2 > take key room 1 >")
    reward(1.0)


def foreign_ids() -> None:
    post("completions", prompt=[5, 6, 7])
    post("completions", prompt=[5, 6, 8, 8, 8, 8])
    reward(1.0)


def no_reward() -> None:
    chat(asked("room 1"))


def no_calls() -> None:
    try:
        print(1 / 0)
    except ZeroDivisionError as error:
        print(f"ZeroDivisionError: {error}", file=sys.stderr)
        sys.exit(3)


def hang() -> None:
    chat(asked("room 1"))
    time.sleep(60)


def no_part() -> None:
    chat(asked("room 1"))
    reward(1.0)


def ids() -> None:
    first = post("completions", prompt=[5, 6, 7], return_token_ids=True)["choices"][0]
    assert first["prompt_token_ids"] == [5, 6, 7]
    post("completions", prompt=[5, 6, 7, *first["token_ids"], 8, 9], max_tokens=2)
    reward(0.5, success=True)


def tools() -> None:
    """An assistant's message goes back without the fields that were null, as the openai client sends it."""
    first = chat(asked("room 1"), tools=TOOLS)
    back = {name: value for name, value in first.items() if value is not None}
    chat(asked("room 1"), back, asked("room 2"), tools=TOOLS, temperature=0.3, top_p=0.9, seed=1, user="x")
    reward(0.25)
    reward(0.25, success=True)


def stream() -> None:
    request = urllib.request.Request(
        f"{os.environ['OPENAI_BASE_URL']}/chat/completions",
        json.dumps({"messages": [asked("room 1")], "stream": True}).encode(),
        {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    )
    with urllib.request.urlopen(request) as reply:
        lines = [line[6:] for line in reply.read().decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    said = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])
    chat(asked("room 1"), {"role": "assistant", "content": said}, asked("room 2"))
    reward(0.5, success=True)


def hang_up() -> None:
    """A client that gives up waiting, and asks again: as ``openai.OpenAI(timeout=...)`` does by itself."""
    at = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])
    for _ in range(3):
        gone = http.client.HTTPConnection(str(at.hostname), at.port)
        key = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
        gone.request("POST", f"{at.path}/chat/completions", json.dumps({"messages": [asked("room 1")]}), key)
        gone.close()
    while True:
        try:
            first = chat(asked("room 1"))
            break
        except Refused as refusal:
            assert "one after the other" in str(refusal)
    chat(asked("room 1"), {"role": "assistant", "content": first["content"]}, asked("room 2"))
    reward(0.5, success=True)


def parts() -> None:
    first = chat(asked("room 1"))
    chat(asked("room 1"), {"role": "assistant", "content": first["content"]}, asked("room 2"))
    reward(0.5, success=True, parts={"style": 0.25})


def endless() -> None:
    messages = [asked("room 1")]
    for _ in range(50):
        messages += [{"role": "assistant", "content": chat(*messages)["content"]}, asked("room 2")]


def refusals(out: str) -> None:
    chat(asked("room 1"))
    bodies: dict[str, dict[str, Any]] = {
        "n": {"n": 2},
        "logit_bias": {"logit_bias": {"5": 1}},
        "codes": {"codes": [1]},
        "allowed_codes": {"allowed_codes": [1]},
        "presence_penalty": {"presence_penalty": 0.5},
        "logprobs": {"logprobs": True},
        "top_logprobs": {"top_logprobs": 0},
        "max_tokens": {"max_tokens": 0},
        "stream_options": {"stream_options": {"include_usage": True}},
        "stop": {"stop": ["x"]},
        "decode=token": {"decode": "token"},
        "tool_choice": {"tools": TOOLS, "tool_choice": "required"},
        "response_format": {"response_format": {"type": "json_object"}},
    }
    said = {}
    for name, body in bodies.items():
        try:
            chat(asked("room 1"), **body)
        except Refused as refusal:
            said[name] = str(refusal)
    try:
        reward(1.0, parts={"style": 1.0})
    except Refused as refusal:
        said["parts"] = str(refusal)
    reward(1.0)
    os.environ["OPENAI_API_KEY"] = "sk-another"
    try:
        reward(1.0)
    except Refused as refusal:
        said["key"] = str(refusal)
    with open(out, "w") as file:
        json.dump(said, file)


def children(folder: str) -> None:
    for code in ("import time; time.sleep(300)",):
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        open(f"{folder}/{child.pid}.pid", "w").close()
    open(f"{folder}/{os.getpid()}.pid", "w").close()
    time.sleep(300)


globals()[sys.argv[1]](*sys.argv[2:])
