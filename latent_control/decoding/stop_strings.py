"""Strings that end a response, beside the end tokens.

A row ends with the first token after which the text of its new tokens holds one of the strings. That token may hold
more than the string's end (``"stopper"`` after ``"non"`` ends a row at ``"stop"``); it is kept among the tokens and
codes, so a loss covers it, while the text is cut before the string (``spoken_text``). The prompt does
not count: a string that begins in it is not found. An end token ends a row as well, whichever comes first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from latent_control.decoding.guide import Watch
from latent_control.text import end_tokens, spoken_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 16
"""Tokens of a row that are decoded at each step, and as many as the longest string has characters."""
MARGIN = 8
"""Characters at the start of a window that may differ from the whole text's: a space that tokenizers drop there, the
rest of a character whose first bytes lie before it."""


class StopStrings:
    """A ``Watch`` that ends the rows of one call of ``generate`` whose text holds one of ``strings``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        self.longest = max(map(len, strings))
        self.windows: defaultdict[int, list[int]] = defaultdict(list)

    def __call__(self, rows: list[int], tokens: list[int], codes: list[int]) -> list[bool]:
        """Which of ``rows`` end with their new ``tokens``; a row depends on its own tokens alone."""
        for row, token in zip(rows, tokens, strict=True):
            self.windows[row].append(token)
        texts = spoken_texts(self.tokenizer, [self.windows[row] for row in rows])
        for row, text in zip(rows, texts, strict=True):
            if len(self.windows[row]) >= WINDOW + self.longest:
                self._shorten(row, text)
        return [any(string in text for string in self.strings) for text in texts]

    def _shorten(self, row: int, text: str) -> None:
        """Forget the older half of a window where the rest says all that a string can still begin in."""
        later = self.windows[row][len(self.windows[row]) // 2 :]
        tail = spoken_texts(self.tokenizer, [later])[0].lstrip("\ufffd")
        if len(tail) >= self.longest + MARGIN and text.endswith(tail):
            self.windows[row] = later


def stop_watch(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], *others: Watch | None) -> Watch | None:
    """What ends rows at ``strings`` or where one of ``others`` says so; ``None``: nothing does."""
    watches = [*([StopStrings(tokenizer, strings)] if strings else []), *(other for other in others if other)]
    if len(watches) < 2:
        return watches[0] if watches else None

    def watch(rows: list[int], tokens: list[int], codes: list[int]) -> list[bool]:
        return [any(said) for said in zip(*(one(rows, tokens, codes) for one in watches), strict=True)]

    return watch


def ended(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], ids: Sequence[int]) -> bool:
    """Whether finished ``ids`` ended by themselves: with an end token, or with one of the strings."""
    return bool(ids) and (ids[-1] in end_tokens(tokenizer) or holds(tokenizer, strings, ids))


def holds(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], ids: Sequence[int]) -> bool:
    """Whether the text of ``ids`` holds one of the strings."""
    text = spoken_texts(tokenizer, [ids])[0] if strings else ""
    return any(string in text for string in strings)


def stopped_length(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], ids: Sequence[int]) -> int | None:
    """How many of finished ``ids`` a row keeps that is cut with the token that completes a string; ``None``: none
    does."""
    if not strings:
        return None
    row = StopStrings(tokenizer, strings)
    return next((place for place, token in enumerate(ids, 1) if row([0], [token], [0])[0]), None)
