"""The text of single tokens, without loading a model or its libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

FILE, MOST_BYTES = "tokenizer.json", 64 << 20


def token_texts(base: str) -> Callable[[Sequence[int]], list[str]]:
    """What maps token ids to their texts, by the tokenizer of a base LM: a folder, or a hub id in the local cache.

    Raises:
        ValueError: there is none here that can be read.
    """
    path = _file(base)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    known: dict[int, str] = {}

    def texts(tokens: Sequence[int]) -> list[str]:
        for token in set(tokens) - known.keys():
            known[token] = tokenizer.decode([token], skip_special_tokens=False) if token >= 0 else ""
        return [known[token] for token in tokens]

    return texts


def _file(base: str) -> Path:
    path = Path(base) / FILE
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(base, FILE)
        except HFValidationError:
            found = None
        if not isinstance(found, str):
            raise ValueError(f"there is no {FILE} of {base} on this machine")
        path = Path(found)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: at most {MOST_BYTES} are read")
    return path
