"""Text to token ids and back, as training, serving and notebooks do it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from latent_control.bases.foreign_code import BASE_KEY, code_refused
from latent_control.bases.weight_files import file_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_ITS_OWN = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""``tokenizer_class`` of a tokenizer that is all in its ``tokenizer.json``."""


def load_tokenizer(
    source: str | Path, *, trust_remote_code: bool = False, key: str | None = BASE_KEY, **settings: Any
) -> PreTrainedTokenizerBase:
    """``AutoTokenizer.from_pretrained``, but a folder's own tokenizer is taken as it is, and nothing is asked about
    code.

    For some architectures (Qwen2, Phi-3) AutoTokenizer puts the architecture's usual one in its place, which splits
    texts otherwise.

    Args:
        key: the setting that lets code in ``source`` run, for the message; ``None`` where there is none.

    Raises:
        OSError, ValueError: there is no tokenizer, or it needs code of its own.
    """
    folder = Path(source)
    if (folder / "tokenizer.json").exists() and (problem := file_problem(folder / "tokenizer.json")):
        raise ValueError(problem)
    with code_refused(source, key=key):
        if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
            said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            if said.get("tokenizer_class") in OF_ITS_OWN and "auto_map" not in said:
                own = PreTrainedTokenizerFast.from_pretrained(str(folder), trust_remote_code=False, **settings)
                return cast("PreTrainedTokenizerBase", own)
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code, **settings)
        return cast("PreTrainedTokenizerBase", tokenizer)


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's end token; ``ValueError`` when it has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end token; set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def whole_characters(text: str) -> str:
    """``text`` with a question mark for every half of a character (a lone surrogate), which tokenizers and Parquet
    refuse."""
    return text.encode("utf-8", "replace").decode()


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Ids of ``text`` as the tokenizer gives them."""
    return list(
        cast("list[int]", tokenizer(whole_characters(text), add_special_tokens=add_special_tokens)["input_ids"])
    )


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """Ids of a prompt, ready to be continued: with the start token and no end token, or as a user message in the chat
    template.

    Raises:
        ValueError: ``chat``, but the tokenizer has no template.
    """
    if chat:
        return encode_messages(tokenizer, [{"role": "user", "content": text}])
    ids = encode_plain(tokenizer, text)
    # Some tokenizers close every text; the response has to follow.
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, ready for the assistant's turn; ``ValueError`` without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"task.chat is true, but {tokenizer.name_or_path!r} has no chat template; set task.chat to false"
        )
    return list(
        cast(
            "list[int]",
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False),
        )
    )


def plain_texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts of token rows as they are, outer spaces included."""
    if tokenizer.is_fast:  # all at once: 0.7 ms for 128 rows, one by one 14
        backend = cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer
        return cast("list[str]", backend.decode_batch([list(row) for row in rows], skip_special_tokens=True))
    settings: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [cast("str", tokenizer.decode(list(row), **settings)) for row in rows]


def before_stop(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of the strings ``stop``."""
    return text[: min((place for string in stop if (place := text.find(string)) >= 0), default=len(text))]


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Text of generated ``ids``, up to the first end token or string of ``stop``, without special tokens or outer
    spaces."""
    end, kept = end_token(tokenizer), list(ids)
    if end in kept:
        kept = kept[: kept.index(end)]
    return before_stop(plain_texts(tokenizer, [kept])[0], stop).strip()
