"""A chat request's messages and tools as a chat template takes them."""

from __future__ import annotations

from typing import Any

from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.requests import ChatRequest, Message
from rollout_workers.openai_api.tool_calls import parsed, told_in_words


def turns_of(request: ChatRequest) -> list[dict[str, Any]]:
    """Turns as messages say them: text parts joined by line breaks, arguments of calls as objects.

    Raises:
        RefusedRequest: a message has something that is no text, or lacks what its role needs.
    """
    return [_turn(message, f"messages.{place}") for place, message in enumerate(request.messages)]


def tools_of(request: ChatRequest) -> list[dict[str, Any]]:
    """The tools that may be called, as a template takes them."""
    return [tool.model_dump(exclude_none=True) for tool in request.callable()]


def worded(
    turns: list[dict[str, Any]], tools: list[dict[str, Any]], template: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Turns and tools for a template: where it has no word for tools, developers or calls, the same told in words it
    has."""
    if "tool" not in template:
        turns, tools = told_in_words(turns, tools), []
    if "developer" not in template:
        turns = [turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in turns]
    return turns, tools


def _turn(message: Message, place: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": _text(message, place)}
    if message.name is not None:
        turn["name"] = message.name
    if message.role == "tool":
        if message.tool_call_id is None:
            raise RefusedRequest(
                f"{place}.tool_call_id is missing: say which call this is the result of", param="messages"
            )
        turn["tool_call_id"] = message.tool_call_id
    elif message.tool_call_id is not None:
        raise RefusedRequest(f"{place}.tool_call_id belongs to the role tool, not {message.role}", param="messages")
    if message.tool_calls:
        if message.role != "assistant":
            raise RefusedRequest(
                f"{place}.tool_calls belong to the role assistant, not {message.role}", param="messages"
            )
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments, place)},
            }
            for call in message.tool_calls
        ]
    return turn


def _text(message: Message, place: str) -> str:
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise RefusedRequest(f"{place}.content is missing", param="messages")
        return message.refusal or ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = {"text": part.text, "refusal": part.refusal}.get(part.type)
        if text is None:
            raise RefusedRequest(
                f"{place}.content has a part of type {part.type!r:.40}: the model reads parts of type text, with text",
                param="messages",
            )
        texts.append(text)
    return "\n".join(texts)


def _arguments(given: str, place: str) -> dict[str, Any]:
    try:
        found = parsed(given or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RefusedRequest(f"{place}.tool_calls: arguments {given!r:.60} are not a JSON object", param="messages")
    return found
