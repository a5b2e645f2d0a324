"""Text to token ids and back, and the tokens that end a response: the one place for training, serving and notebooks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from latent_control.bases.chat_template import TEMPLATE_ERRORS, TemplateBoundError, render
from latent_control.bases.foreign_code import BASE_KEY, code_refused
from latent_control.bases.loading import load_config
from latent_control.bases.weight_files import file_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_ITS_OWN = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""``tokenizer_class`` of a tokenizer that is all in its ``tokenizer.json``."""
_MODEL_ENDS = "model_end_token_ids"
"""Where a loaded tokenizer keeps the end tokens of the model beside it; saved with it in tokenizer_config.json."""


def load_tokenizer(
    source: str | Path, *, trust_remote_code: bool = False, key: str | None = BASE_KEY, **settings: Any
) -> PreTrainedTokenizerBase:
    """``AutoTokenizer.from_pretrained``, but a folder's own tokenizer is taken as it is, and nothing is asked about
    code.

    For some architectures (Qwen2, Phi-3) AutoTokenizer puts the architecture's usual one in its place, which splits
    texts otherwise. The end tokens that the model in ``source`` names go along (``end_tokens``).

    Args:
        key: the setting that lets code in ``source`` run, for the message; ``None`` where there is none.

    Raises:
        OSError, ValueError: there is no tokenizer, or it needs code of its own.
    """
    folder, loader, runs = Path(source), AutoTokenizer, trust_remote_code
    if (folder / "tokenizer.json").exists() and (problem := file_problem(folder / "tokenizer.json")):
        raise ValueError(problem)
    with code_refused(source, key=key):
        if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
            said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            if said.get("tokenizer_class") in OF_ITS_OWN and "auto_map" not in said:
                loader, runs = PreTrainedTokenizerFast, False
        tokenizer = loader.from_pretrained(str(source), trust_remote_code=runs, **settings)
    if ends := _ends_of_model(source, trust_remote_code, bool(settings.get("local_files_only"))):
        tokenizer.init_kwargs[_MODEL_ENDS] = list(ends)
    return cast("PreTrainedTokenizerBase", tokenizer)


def config_ends(*configs: Any) -> tuple[int, ...]:
    """End tokens that configs of a model name, in order: of models, generation, or ``None``."""
    return _ids(*(getattr(config, "eos_token_id", None) for config in configs))


def _ids(*values: Any) -> tuple[int, ...]:
    """Token ids among values from files: one, a list, or none."""
    flat = (one for value in values for one in (value if isinstance(value, list | tuple) else [value]))
    return tuple(dict.fromkeys(one for one in flat if type(one) is int and one >= 0))


def name_ends(config: GenerationConfig, ends: Iterable[int]) -> None:
    """Let a generation config name the end tokens ``ends`` beside its own."""
    own = config_ends(config)
    if added := [end for end in ends if end not in own]:
        config.eos_token_id = [*own, *added]


def saved_ends(source: str | Path, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """``end_tokens`` of what lies in a folder or hub id; of its configs alone where there is no tokenizer."""
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return _ends_of_model(source, trust_remote_code, False)
    try:
        return end_tokens(load_tokenizer(source, trust_remote_code=trust_remote_code))
    except (OSError, ValueError):
        return _ends_of_model(source, trust_remote_code, False)


def _ends_of_model(source: str | Path, trust_remote_code: bool, local_only: bool) -> tuple[int, ...]:
    """End tokens by config.json and generation_config.json of a folder or hub id; none where no model is."""
    configs: list[Any] = []
    try:
        config = load_config(source, trust_remote_code=trust_remote_code, local_files_only=local_only)
        configs += [config, config.get_text_config()]
        configs.append(GenerationConfig.from_pretrained(str(source), local_files_only=local_only))
    except (OSError, ValueError, KeyError):  # loading the model says what is wrong
        pass
    return config_ends(*configs)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All tokens that end a response: what the chat template puts after an assistant's turn, the tokenizer's own end
    token, and those that the model's config and generation config name (of a tokenizer from ``load_tokenizer``).

    Sources disagree for many models (Gemma, Phi, GLM, most fine-tuned ones), and any of them may be what a model was
    trained to stop with.

    Raises:
        TemplateBoundError: rendering the template takes more than a conversation can need.
    """
    turn = _turn_end(tokenizer, str(tokenizer.chat_template))
    return _ids(turn, tokenizer.eos_token_id, tokenizer.init_kwargs.get(_MODEL_ENDS))


def end_token(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> int:
    """The end token that is put behind a response to train on: of a chat what its template puts there, else the
    tokenizer's.

    Raises:
        ValueError: there is none, or as ``end_tokens``.
    """
    turn = _turn_end(tokenizer, str(tokenizer.chat_template)) if chat else None
    ends = _ids(turn, tokenizer.eos_token_id, end_tokens(tokenizer))
    if not ends:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end token; set eos_token in its tokenizer_config.json"
        )
    return ends[0]


def after_turn(tokenizer: PreTrainedTokenizerBase, *following: dict[str, str]) -> tuple[int | None, str]:
    """The token with which the chat template closes an assistant's turn, and the text between it and the next one,
    when the messages ``following`` come after it. Without such a token ``None``, and all of the text.

    Raises:
        ValueError: the template does not write what the assistant said.
    """
    for place in ("\x00", "QZ79"):  # what no template contains; the second one where what is no letter is changed
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": place}, *following]
        whole = render(tokenizer, messages, add_generation_prompt=bool(following), tokenize=False)
        _, found, text = cast("str", whole).rpartition(place)
        if found:
            break
    else:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} leaves out what the assistant said, so nothing can "
            "follow it; mend the template, or set task.chat to false"
        )
    tokens = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    closing = max((token for token in tokens if token and text.lstrip().startswith(token)), key=len, default=None)
    return (None, text) if closing is None else (tokens[closing], text.lstrip().removeprefix(closing))


@lru_cache(maxsize=16)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """What closes the last turn, or (GLM) opens the next one; ``template`` says whether it is still so."""
    if not tokenizer.chat_template:
        return None
    try:
        last, _ = after_turn(tokenizer)
        return after_turn(tokenizer, {"role": "user", "content": "?"})[0] if last is None else last
    except TemplateBoundError as error:
        raise TemplateBoundError(
            f"the chat template of {tokenizer.name_or_path!r} {error}; mend or remove it"
        ) from error
    except TEMPLATE_ERRORS:  # encode_messages says what is wrong
        return None


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
    """Ids of a prompt, ready to be continued: with what the tokenizer puts in front of texts and without what it puts
    behind them, or as a user message in the chat template.

    Raises:
        ValueError: ``chat``, but the tokenizer has no template.
    """
    if chat:
        return encode_messages(tokenizer, [{"role": "user", "content": text}])
    ids, bare = encode_plain(tokenizer, text), encode_plain(tokenizer, text, add_special_tokens=False)
    # Some tokenizers close every text; the response has to follow.
    ends = (start + len(bare) for start in range(len(ids) - len(bare) + 1) if ids[start : start + len(bare)] == bare)
    return ids[: next(ends, None)] if bare else ids[:1]


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Ids of a conversation with ``tools`` that may be called, ready for the assistant's turn; ``ValueError`` without a
    chat template, and with its own words where it fails."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"task.chat is true, but {tokenizer.name_or_path!r} has no chat template; set task.chat to false"
        )
    turns = [
        {name: whole_characters(value) if isinstance(value, str) else value for name, value in message.items()}
        for message in messages
    ]
    try:
        given = {"tools": [*tools]} if tools else {}
        ids = render(tokenizer, turns, add_generation_prompt=True, tokenize=True, return_dict=False, **given)
    except TEMPLATE_ERRORS as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} refuses this conversation: {said}; change the messages, "
            "mend the template, or set task.chat to false"
        ) from error
    return list(cast("list[int]", ids))


def left_padded(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch, ready to be continued: as ``padded``, on the left."""
    return padded(rows, device, side="left")


def padded(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", *, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T], padded by zeros, which the mask hides: tokenizers need no pad token."""
    ids = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    both = (pad_sequence(some, True, padding_side=side) for some in (ids, [torch.ones_like(row) for row in ids]))
    found, mask = (tensor.to(device) for tensor in both)
    return found, mask


def spoken_texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts of generated rows of ids, each up to its first end token. Special tokens (``<think>``, channels, tool
    calls) are part of it; start and pad tokens are not."""
    ends, silent = end_tokens(tokenizer), {tokenizer.bos_token_id, tokenizer.pad_token_id}
    last = [next((place for place, token in enumerate(ids) if token in ends), len(ids)) for ids in rows]
    kept = [[int(token) for token in ids[:end] if token not in silent] for ids, end in zip(rows, last, strict=True)]
    if len(rows) > 1 and tokenizer.is_fast:  # all at once: 0.7 ms for 128 rows, one by one 14
        backend = cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer
        return cast("list[str]", backend.decode_batch(kept, skip_special_tokens=False))
    return [cast("str", tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in kept]


def spoken_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Text of generated ``ids`` before the first end token and the first of the strings ``stop`` (``spoken_texts``)."""
    text = spoken_texts(tokenizer, [ids])[0]
    return text[: min((place for string in stop if (place := text.find(string)) >= 0), default=len(text))]


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """``spoken_text`` without outer spaces: what verifiers and rows get."""
    return spoken_text(tokenizer, ids, stop).strip()
