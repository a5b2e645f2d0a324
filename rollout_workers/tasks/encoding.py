"""Between a task's texts and token ids; chat templates and end tokens are ``latent_control.text``'s business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from latent_control.text import after_turn, decode_text, encode_messages, encode_plain, encode_text, end_token
from rollout_workers.tasks.protocol import Demonstration, Prompt, after_prompt
from rollout_workers.tasks.sampled_ids import usable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool) -> list[int]:
    """Ids of the prompt, ready to be continued (``encode_text``, ``encode_messages``)."""
    if not chat:
        return encode_text(tokenizer, prompt.text, chat=False)
    messages: list[dict[str, Any]] = [*messages_of(prompt)]
    if not prompt.tools:
        return encode_messages(tokenizer, messages)
    from rollout_workers.openai_api.conversation import worded

    turns, tools = worded(messages, [dict(tool) for tool in prompt.tools], str(tokenizer.chat_template))
    return encode_messages(tokenizer, turns, tools=tools)


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    """What a chat template is given: the prompt's turns, or its text as a user's."""
    return [{"role": role, "content": content} for role, content in prompt.turns or (("user", prompt.text),)]


def encode_demonstration(
    tokenizer: PreTrainedTokenizerBase, demo: Demonstration, *, chat: bool
) -> tuple[list[int], int]:
    """Ids of prompt, response and end token, and the index at which the response starts; those that were sampled, where
    the demonstration has them. A truncated one has no end token."""
    if demo.ids is not None and usable(demo.ids, tokenizer):
        return [*demo.ids.prompt, *demo.ids.response], len(demo.ids.prompt)
    prompt_ids = encode_prompt(tokenizer, demo.prompt, chat=chat)
    # A completion goes on after a space, as the tokenizer saw words in running text; a chat turn starts afresh.
    space = "" if chat else after_prompt(demo.prompt.text)
    response = encode_plain(tokenizer, space + demo.response, add_special_tokens=False)
    end = [] if demo.ids is not None and demo.ids.truncated else [end_token(tokenizer, chat=chat)]
    return [*prompt_ids, *response, *end], len(prompt_ids)


def encode_observation(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool, closed: bool) -> list[int]:
    """Ids between a response and the next one: ``text`` on a new line, or as the next user message of the chat
    template.

    ``closed``: the response ended with an end token; else one comes first, as it does in gold paths. ``text`` must
    not be blank.
    """
    if chat:
        return encode_turns(tokenizer, [{"role": "user", "content": text}], closed=closed)
    return encode_between(tokenizer, "\n" + text, chat=False, closed=closed)


def encode_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, Any]], *, closed: bool) -> list[int]:
    """Ids between a response and the next one where these messages come between, by the chat template."""
    return encode_between(tokenizer, after_turn(tokenizer, *turns)[1], chat=True, closed=closed)


def encode_between(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool, closed: bool) -> list[int]:
    """Ids of ``text`` behind a response, which is closed by an end token unless it is already."""
    end = [] if closed else [end_token(tokenizer, chat=chat)]
    return [*end, *encode_plain(tokenizer, text, add_special_tokens=False)]


def encode_episode(
    tokenizer: PreTrainedTokenizerBase, demo: Demonstration, *, chat: bool
) -> tuple[list[int], list[bool]]:
    """Ids of a demonstration of any number of turns, and which of them belong to its responses (their end tokens
    do)."""
    ids, start = encode_demonstration(tokenizer, demo, chat=chat)
    spoken = [place >= start for place in range(len(ids))]
    space = "" if chat else " "
    for observation, response in demo.later:
        seen = encode_observation(tokenizer, observation, chat=chat, closed=True)
        said = [*encode_plain(tokenizer, space + response, add_special_tokens=False), end_token(tokenizer, chat=chat)]
        ids += [*seen, *said]
        spoken += [False] * len(seen) + [True] * len(said)
    return ids, spoken


def shortened(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> str:
    """``text``, or what its first ``most`` tokens say."""
    ids = encode_plain(tokenizer, text, add_special_tokens=False)
    return text if len(ids) <= most else cast("str", tokenizer.decode(ids[:most]))


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Text of generated ``ids`` before an end token or a string of ``stop`` (``decode_text``)."""
    return decode_text(tokenizer, ids, stop)
