"""Tools in a chat: how a template without a place for them is told of them, and the calls in what a model writes.

Calls are read in the two forms that open models write: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``
(Hermes, Qwen, SmolLM), any number of them between other text, and a bare JSON object or list of those as the whole
text (Llama 3, Mistral; ``parameters`` says the same as ``arguments``).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_TAGGED = re.compile(re.escape(OPEN) + r"(.*?)(?:" + re.escape(CLOSE) + r"|\Z)", re.DOTALL)
_MARKS = ("[TOOL_CALLS]", "<|python_tag|>")
_PREFACE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""The words of Qwen 2.5's chat template."""


@dataclass(frozen=True, kw_only=True)
class WrittenCall:
    """A call that a model wrote; ``arguments`` are JSON."""

    id: str
    name: str
    arguments: str

    def body(self) -> dict[str, Any]:
        """As a reply has it."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


def split_calls(text: str, names: Collection[str]) -> tuple[str | None, list[WrittenCall]]:
    """The words beside the calls of functions ``names`` (``None``: none), and the calls. Where something looks like a
    call and is none of these, all of it is words."""
    if OPEN in text:
        found = [_calls(part, names) for part in _TAGGED.findall(text)]
        if all(found):
            return _TAGGED.sub("", text).strip() or None, [call for calls in found for call in calls]
        return text, []
    bare = text.strip()
    for mark in _MARKS:
        bare = bare.removeprefix(mark).strip()
    calls = _calls(bare, names) if bare[:1] in ("{", "[") else []
    return (None, calls) if calls else (text, [])


def shown_before_calls(text: str) -> str:
    """What of a growing text is words for sure."""
    start = text.lstrip()
    if start[:1] in ("{", "[") or any(mark.startswith(start[: len(mark)]) for mark in _MARKS if start):
        return ""
    if OPEN in text:
        return text[: text.index(OPEN)].rstrip()
    held = max((size for size in range(1, len(OPEN)) if text.endswith(OPEN[:size])), default=0)
    return text[: len(text) - held].rstrip() if held else text.rstrip()


def parsed(text: str) -> Any:
    """What a JSON text says, which can be said again in UTF-8; ``ValueError`` where it is none, or has NaN, an infinity
    or half of a character (a lone surrogate)."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return found


def _calls(text: str, names: Collection[str]) -> list[WrittenCall]:
    """The calls in a JSON text; none where it is something else."""
    try:
        found = parsed(text)
    except ValueError:
        return []
    calls = []
    for one in found if isinstance(found, list) else [found]:
        given = one.get("arguments", one.get("parameters", {})) if isinstance(one, dict) else None
        if not isinstance(given, dict) or one.get("name") not in names:
            return []
        calls.append(
            WrittenCall(
                id=f"call_{secrets.token_hex(12)}", name=one["name"], arguments=json.dumps(given, ensure_ascii=False)
            )
        )
    return calls


def call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of one call of one of ``tools``, each ``{"name": ..., "parameters": {...}}``."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["name"]},
                    "arguments": _moved(
                        tool.get("parameters") or {"type": "object", "properties": {}},
                        f"#/anyOf/{place}/properties/arguments",
                    ),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for place, tool in enumerate(tools)
        ]
    }


def _moved(part: Any, to: str) -> Any:
    """A part of a schema that will stand at ``to`` in another one: its references to its own root begin there."""
    if isinstance(part, list):
        return [_moved(one, to) for one in part]
    if not isinstance(part, Mapping):
        return part
    refers = isinstance(part.get("$ref"), str) and part["$ref"].startswith("#")
    moved = {name: _moved(value, to) for name, value in part.items()}
    return moved | {"$ref": to + part["$ref"][1:]} if refers else moved


def told_in_words(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation for a template that knows no tools: they stand in the system message, calls in the
    assistant's words, results in a user's turn."""
    told: list[dict[str, Any]] = []
    for turn in turns:
        content = turn["content"]
        if turn["role"] == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if told and told[-1].get("results"):
                told[-1]["content"] += "\n" + content
            else:
                told.append({"role": "user", "content": content, "results": True})
            continue
        for call in turn.get("tool_calls", ()):
            said = json.dumps(call["function"], ensure_ascii=False)
            content += ("\n" if content else "") + f"{OPEN}\n{said}\n{CLOSE}"
        told.append({"role": turn["role"], "content": content})
    if tools:
        preface = _PREFACE.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if told[0]["role"] in ("system", "developer"):
            told[0]["content"] += "\n\n" + preface
        else:
            told.insert(0, {"role": "system", "content": preface})
    return [{name: value for name, value in turn.items() if name != "results"} for turn in told]
