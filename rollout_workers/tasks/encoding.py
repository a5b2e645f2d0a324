"""Between a task's texts and token ids; chat templates and end tokens are ``latent_control.text``'s business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from latent_control.text import decode_text, encode_plain, encode_text, end_token
from rollout_workers.tasks.protocol import Demonstration, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool) -> list[int]:
    """Ids of the prompt, ready to be continued (``encode_text``)."""
    return encode_text(tokenizer, prompt.text, chat=chat)


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, demo: Demonstration, *, chat: bool) -> tuple[list[int], int]:
    """Ids of prompt, response and end token, and the index at which the response starts."""
    prompt_ids = encode_prompt(tokenizer, demo.prompt, chat=chat)
    # A completion goes on after a space, as the tokenizer saw words in running text; a chat turn starts afresh.
    space = "" if chat or demo.prompt.text[-1:].isspace() else " "
    response = encode_plain(tokenizer, space + demo.response, add_special_tokens=False)
    return [*prompt_ids, *response, end_token(tokenizer)], len(prompt_ids)


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of generated ``ids`` (``decode_text``)."""
    return decode_text(tokenizer, ids)
