"""Log-probabilities of tokens in OpenAI's two formats."""

from __future__ import annotations

from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from latent_control.decoding.token_scores import TokenScore
from rollout_workers.openai_api.protocol import DecodedRow
from rollout_workers.openai_api.text_stream import TokenTexts


@dataclass(frozen=True, kw_only=True)
class Echo:
    """A prompt that a completion begins with, and its tokens' log-probabilities but the first's."""

    text: str
    tokens: Sequence[int]
    scores: Sequence[TokenScore] | None


@dataclass(kw_only=True)
class ChoiceState:
    """What of a row was said already."""

    shown: int = 0
    """Characters of its text"""
    first: int | None = None
    """Token"""
    last: int | None = None
    """Token"""
    offset: int = 0
    """Characters of tokens, those of the prompt included where the answer begins with it"""
    rest: IncrementalDecoder = field(default_factory=lambda: getincrementaldecoder("utf-8")("replace"))
    """Bytes of a character that is not whole yet"""

    def begin(self, part: DecodedRow, echo: Echo | None) -> None:
        """Note the first token of the row, behind the prompt that the answer begins with."""
        if self.first is None and part.tokens:
            self.first = part.tokens[0]
            if echo is not None:
                self.last, self.offset = echo.tokens[-1], len(echo.text)

    def fresh(self, text: str) -> str:
        """What of ``text`` was not said yet."""
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new

    def go_on(self, token: int, piece: bytes) -> None:
        """Go on behind a token of these bytes."""
        self.last, self.offset = token, self.offset + len(self.rest.decode(piece))


@dataclass(frozen=True, kw_only=True)
class LogprobWording:
    """``LogprobWording(chat=True, texts=TokenTexts(tokenizer), ends=(2,))``"""

    chat: bool
    texts: TokenTexts
    ends: Sequence[int]
    """End tokens, which have no text"""

    def of(self, part: DecodedRow, state: ChoiceState, echo: Echo | None, length: int | None) -> dict[str, Any] | None:
        """Of the tokens whose text the reply has (of at most ``length`` characters): not of an end token, but where the
        reply begins with its prompt. There harnesses drop the last one, taking it for what was generated."""
        if not part.scores and (echo is None or echo.scores is None):
            return None
        listed: list[tuple[int, TokenScore | None]] = []
        if echo is not None:
            listed = [(token, score) for token, score in zip(echo.tokens, [None, *(echo.scores or ())], strict=False)]
        every = list(zip(part.tokens, part.scores, strict=True))
        own = every if echo is not None else [pair for pair in every if pair[0] not in self.ends]
        most = None if length is None else length + len(echo.text if echo else "")
        entries = self._entries([*listed, *own], state, most, prompt=len(listed))
        if self.chat:
            return {"content": [self._chat_entry(*entry) for entry in entries], "refusal": None}
        return {
            "tokens": [self._name(piece) for piece, *_ in entries],
            "token_logprobs": [None if score is None else score.logp for *_, score in entries],
            "top_logprobs": [self._top(*entry) for entry in entries],
            "text_offset": [offset for _, offset, *_ in entries],
        }

    def _entries(
        self, listed: Sequence[tuple[int, TokenScore | None]], state: ChoiceState, length: int | None, *, prompt: int
    ) -> list[tuple[bytes, int, int | None, int, TokenScore | None]]:
        """Bytes, offset, token before, token and score of each, up to the text's end; the first ``prompt`` are the
        prompt's."""
        entries = []
        for place, (token, score) in enumerate(listed):
            ends = place >= prompt and token in self.ends
            if length is not None and state.offset >= length and score is not None and not ends:
                break
            piece = b"" if ends else self.texts.piece(state.last, token)
            entries.append((piece, state.offset, state.last, token, score))
            state.go_on(token, piece)
        return entries

    def _name(self, piece: bytes) -> str:
        """Of a token: its text, or, as OpenAI's, its bytes where they are no whole characters."""
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return ("" if self.chat else "bytes:") + "".join(f"\\x{byte:02x}" for byte in piece)

    def _chat_entry(
        self, piece: bytes, _: int, before: int | None, token: int, score: TokenScore | None
    ) -> dict[str, Any]:
        assert score is not None
        top = [self._said(self.texts.piece(before, one), logp) for one, logp in score.top]
        return self._said(piece, score.logp) | {"top_logprobs": top}

    def _said(self, piece: bytes, logp: float) -> dict[str, Any]:
        return {"token": self._name(piece), "logprob": logp, "bytes": list(piece)}

    def _top(
        self, piece: bytes, _: int, before: int | None, token: int, score: TokenScore | None
    ) -> dict[str, float] | None:
        """The likeliest tokens' and the token's own; of tokens with the same text the likeliest one's."""
        if score is None:
            return None
        found: dict[str, float] = {}
        for one, logp in score.top:
            found.setdefault(self._name(self.texts.piece(before, one)), logp)
        found.setdefault(self._name(piece), score.logp)
        return found
