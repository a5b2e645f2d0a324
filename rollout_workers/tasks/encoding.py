"""Between a task's texts and token ids: the one place that knows about chat templates and end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from rollout_workers.tasks.protocol import Demonstration, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end token; set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def _plain(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> list[int]:
    return list(cast("list[int]", tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool) -> list[int]:
    """Ids of the prompt, ready to be continued.

    ``chat`` wraps the text as a user message in the tokenizer's chat template (``ValueError`` when it has none);
    otherwise the text gets the tokenizer's own start token, and no end token.
    """
    if chat:
        if not tokenizer.chat_template:
            raise ValueError(f"task.chat is true, but {tokenizer.name_or_path!r} has no chat template; set task.chat to false")
        messages = [{"role": "user", "content": prompt.text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(cast("list[int]", ids))
    ids = _plain(tokenizer, prompt.text)
    # Some tokenizers close every text; the response has to follow.
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, demo: Demonstration, *, chat: bool) -> tuple[list[int], int]:
    """Ids of prompt, response and end token, and the index at which the response starts."""
    prompt_ids = encode_prompt(tokenizer, demo.prompt, chat=chat)
    # A completion goes on after a space, as the tokenizer saw words in running text; a chat turn starts afresh.
    space = "" if chat or demo.prompt.text[-1:].isspace() else " "
    response = _plain(tokenizer, space + demo.response, add_special_tokens=False)
    return [*prompt_ids, *response, _end_token(tokenizer)], len(prompt_ids)


def encode_observation(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool, closed: bool) -> list[int]:
    """Ids between a response and the next one: ``text`` on a new line, or as the next user message of the chat template.

    ``closed``: the response ended with the end token; else that comes first, as it does in gold paths. ``text`` must not be blank.
    """
    end = [] if closed else [_end_token(tokenizer)]
    if not chat:
        return [*end, *_plain(tokenizer, "\n" + text, add_special_tokens=False)]
    place = "\x00"  # what a template cannot contain, so that what follows the assistant's words is found
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": place}, {"role": "user", "content": text}]
    whole = cast("str", tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    between = whole.partition(place)[2].removeprefix(str(tokenizer.eos_token))
    return [*end, *_plain(tokenizer, between, add_special_tokens=False)]


def encode_episode(tokenizer: PreTrainedTokenizerBase, demo: Demonstration, *, chat: bool) -> tuple[list[int], list[bool]]:
    """Ids of a demonstration of any number of turns, and which of them belong to its responses (their end tokens do)."""
    ids, start = encode_demonstration(tokenizer, demo, chat=chat)
    spoken = [place >= start for place in range(len(ids))]
    space = "" if chat else " "
    for observation, response in demo.later:
        seen = encode_observation(tokenizer, observation, chat=chat, closed=True)
        said = [*_plain(tokenizer, space + response, add_special_tokens=False), _end_token(tokenizer)]
        ids += [*seen, *said]
        spoken += [False] * len(seen) + [True] * len(said)
    return ids, spoken


def shortened(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> str:
    """``text``, or what its first ``most`` tokens say."""
    ids = _plain(tokenizer, text, add_special_tokens=False)
    return text if len(ids) <= most else cast("str", tokenizer.decode(ids[:most], skip_special_tokens=True))


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of generated ``ids``, up to the first end token and without special tokens or outer spaces."""
    end = _end_token(tokenizer)
    kept = list(ids)
    if end in kept:
        kept = kept[: kept.index(end)]
    text = cast("str", tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text.strip()
