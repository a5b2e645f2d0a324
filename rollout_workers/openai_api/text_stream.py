"""The text of a row that is being decoded: what of it can be shown already, where it stops, and the bytes of single
tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from latent_control.text import spoken_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HOLE = "\ufffd"
"""What a decoder puts where bytes are no whole character"""
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")
_WINDOW = 32
"""Tokens of a row that are decoded at each step at most: what lies before them has its text."""


class TextStream:
    """The text of a growing row of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.longest = max(map(len, stop), default=0)
        self.window: list[int] = []
        self.before, self.text = "", ""
        self.stopped = False

    def push(self, token: int) -> None:
        """Take one more token."""
        push_all([self], [token])

    def take(self, window: str) -> None:
        """Take the text of the window, with a new token in it."""
        text, known = self.before + window, max(0, len(self.text) - self.longest)
        # What was the rest of a character may have become something else.
        found = [place for stop in self.stop if (place := text.find(stop, max(0, known - 1))) >= 0]
        self.text, self.stopped = (text[: min(found)], True) if found else (text, False)
        if len(self.window) >= _WINDOW:
            self._shorten(window)

    def _shorten(self, window: str) -> None:
        """Forget the older half of the window where the rest alone has the same text."""
        later = self.window[_WINDOW // 2 :]
        tail = spoken_texts(self.tokenizer, [later])[0]
        if tail and not tail.startswith(_HOLE) and window.endswith(tail):
            self.before, self.window = self.before + window[: -len(tail)], later

    def safe(self) -> str:
        """Without an end that may still become another character or a stop string."""
        if self.stopped:
            return self.text
        held = len(self.text) - len(self.text.rstrip(_HOLE))
        for stop in self.stop:
            held = max([held, *(size for size in range(1, len(stop)) if self.text.endswith(stop[:size]))])
        return self.text[: len(self.text) - held]


def push_all(streams: Sequence[TextStream], tokens: Sequence[int]) -> None:
    """A new token for each of the streams, which share a tokenizer: decoding them at once is many times faster."""
    if not streams:
        return
    for stream, token in zip(streams, tokens, strict=True):
        stream.window.append(token)
    for stream, window in zip(
        streams, spoken_texts(streams[0].tokenizer, [stream.window for stream in streams]), strict=True
    ):
        stream.take(window)


class TokenTexts:
    """Bytes of single tokens, as they follow another one: a character may take several tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        self.piece = lru_cache(maxsize=65536)(self._piece)
        self._letter: int | None = next(reversed(tokenizer.encode("a", add_special_tokens=False)), None)

    def text(self, tokens: Sequence[int]) -> str:
        """What ``tokens`` say together, special ones too."""
        pieces = [self.piece(last, token) for last, token in zip([None, *tokens[:-1]], tokens, strict=True)]
        return b"".join(pieces).decode(errors="replace")

    def _piece(self, before: int | None, token: int) -> bytes:
        """What ``token`` adds behind the token ``before``."""
        if _HOLE in (alone := self._decoded([token])):
            return self._spelled(token) or alone.encode()
        if before is None:
            return alone.encode()
        if _HOLE in (first := self._decoded([before])):
            before, first = self._letter, "a"  # whatever is whole: some tokenizers drop the first space of a text
        both = self._decoded([before, token])
        return (both[len(first) :] if both.startswith(first) else alone).encode()

    def _spelled(self, token: int) -> bytes | None:
        """The bytes of a part of a character, as byte-level BPE and byte fallback spell them; ``None``: it is none."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        spelled: str = self.tokenizer.convert_ids_to_tokens(token)
        if fallback := _FALLBACK.fullmatch(spelled):
            return bytes.fromhex(fallback[1])
        alphabet = {letter: byte for byte, letter in bytes_to_unicode().items()}
        return bytes(map(alphabet.__getitem__, spelled)) if alphabet.keys() >= set(spelled) else None

    def _decoded(self, ids: Sequence[int | None]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
