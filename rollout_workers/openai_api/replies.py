"""Replies in OpenAI's format, whole or in events, with codes beside the tokens.

Fields beyond OpenAI's, of each choice: ``codes``, ``code_logprobs``, ``token_ids``, one for each token, the end token
included; ``grammar_codes_left`` where a grammar bound the row. Of the reply: ``decode``.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.schema import Decode
from rollout_workers.openai_api.logprobs import ChoiceState, Echo, LogprobWording
from rollout_workers.openai_api.protocol import DecodedRow
from rollout_workers.openai_api.tool_calls import WrittenCall, shown_before_calls, split_calls


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Formats the replies to one request.

    ``Wording(chat=True, model="first", logprobs=logprobs, decode="code", prompts=[[5, 9]], n=1)``
    """

    chat: bool
    model: str
    logprobs: LogprobWording
    decode: Decode
    prompts: Sequence[Sequence[int]]
    n: int
    tools: Sequence[str] = ()
    """Names of functions that may be called"""
    named: bool = False
    """Whether one of them had to be"""
    bound: bool = False
    """Whether a grammar binds the rows"""
    echoes: Sequence[Echo] = ()
    with_prompt_ids: bool = False
    with_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    # -- whole -------------------------------------------------------------------------------------------------------

    def whole(self, answers: Sequence[DecodedRow]) -> dict[str, Any]:
        """The reply with all rows."""
        choices = []
        for index, answer in enumerate(answers):
            text, calls, reason = self._read(answer)
            state, echo = ChoiceState(), self._echo(index)
            logprobs = self.logprobs.of(answer, state, echo, len(answer.text))
            said = self._said(self._echoed(text, answer, echo), calls)
            choices.append({"index": index, **said, "finish_reason": reason, "logprobs": logprobs}
                           | self._extras(answer) | self._prompt_ids(index))  # fmt: skip
        return self._head("") | self._top_ids() | {"choices": choices, "usage": self.usage(answers)}

    def usage(self, answers: Sequence[DecodedRow]) -> dict[str, int]:
        """Tokens of prompts and answers."""
        new, old = sum(len(answer.tokens) for answer in answers), sum(map(len, self.prompts))
        return {"prompt_tokens": old, "completion_tokens": new, "total_tokens": old + new}

    # -- events ------------------------------------------------------------------------------------------------------

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a row's events begin with: the role, or the prompt."""
        if self.chat:
            delta = {"role": "assistant", "content": "", "refusal": None}
            return [self._event(index, {"delta": delta}) | self._top_ids()]
        echo = self._echo(index)
        if echo is None and not self.with_prompt_ids:
            return []
        logprobs = None if echo is None else self.logprobs.of(DecodedRow(), ChoiceState(), echo, 0)
        said = {"text": "" if echo is None else echo.text, **self._prompt_ids(index)}
        return [self._event(index, said, logprobs=logprobs)]

    def piece(self, index: int, part: DecodedRow, state: ChoiceState) -> dict[str, Any]:
        """One event of a stream: new tokens of row ``index``; ``part.text`` is all of its text that is sure."""
        echo = self._echo(index)
        state.begin(part, echo)
        new = state.fresh(shown_before_calls(part.text) if self.tools else part.text)
        if new and len(new) == state.shown and echo is not None:
            new = self._gap(echo, state.first) + new
        logprobs = self.logprobs.of(part, state, None, None)
        return self._event(index, self._words(new), logprobs=logprobs, extras=self._extras(part))

    def closing(self, index: int, answer: DecodedRow, state: ChoiceState) -> list[dict[str, Any]]:
        """The last events of a row, of which ``answer`` is the whole."""
        text, calls, reason = self._read(answer)
        events = [
            self._event(index, {"delta": {"tool_calls": [{"index": place, **call.body()}]}})
            for place, call in enumerate(calls)
        ]
        said = shown_before_calls(answer.text).strip() if calls else answer.text[: state.shown]
        rest, echo = (text or "")[len(said) :], self._echo(index)
        if rest and not state.shown and echo is not None:
            rest = self._gap(echo, state.first) + rest
        return [*events, self._event(index, self._words(rest), reason=reason)]

    def last(self, answers: Sequence[DecodedRow]) -> dict[str, Any]:
        """The event with the usage."""
        return self._head(".chunk") | {"choices": [], "usage": self.usage(answers)}

    def _event(
        self,
        index: int,
        said: dict[str, Any],
        *,
        reason: str | None = None,
        logprobs: Any = None,
        extras: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        extras = extras or self._extras(DecodedRow())
        choice = {"index": index, **said, "finish_reason": reason, "logprobs": logprobs, **extras}
        usage = {"usage": None} if self.with_usage else {}
        return self._head(".chunk") | {"choices": [choice], **usage}

    # -- parts -------------------------------------------------------------------------------------------------------

    def _read(self, answer: DecodedRow) -> tuple[str | None, list[WrittenCall], str | None]:
        """Words, calls and the reason of the end."""
        if not self.tools:
            return answer.text, [], answer.finish_reason
        text, calls = split_calls(answer.text, self.tools)
        called = calls and answer.finish_reason == "stop" and not self.named
        return text, calls, "tool_calls" if called else answer.finish_reason

    def _said(self, text: str | None, calls: Sequence[WrittenCall]) -> dict[str, Any]:
        if not self.chat:
            return {"text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["tool_calls"] = [call.body() for call in calls]
        return {"message": message}

    def _words(self, text: str) -> dict[str, Any]:
        if not self.chat:
            return {"text": text}
        return {"delta": {"content": text} if text else {}}

    def _extras(self, answer: DecodedRow) -> dict[str, Any]:
        """Which code produced each token."""
        own: dict[str, Any] = {
            "codes": answer.codes,
            "code_logprobs": [round(x, 6) for x in answer.code_logp],
            "token_ids": answer.tokens,
        }
        return own | {"grammar_codes_left": answer.codes_left} if self.bound else own

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        head = {"id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}", "object": kind, "created": self.created}
        return head | {"model": self.model, "system_fingerprint": None, "decode": self.decode}

    def _top_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.prompts[0])} if self.chat and self.with_prompt_ids else {}

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        if self.chat or not self.with_prompt_ids:
            return {}
        return {"prompt_token_ids": list(self.prompts[index // self.n])}

    def _echo(self, index: int) -> Echo | None:
        return self.echoes[index // self.n] if self.echoes else None

    def _echoed(self, text: str | None, answer: DecodedRow, echo: Echo | None) -> str | None:
        if echo is None:
            return text
        return echo.text + (self._gap(echo, answer.tokens[0]) + text if text else "")

    def _gap(self, echo: Echo, first: int | None) -> str:
        """What a tokenizer that drops spaces at the start of a text puts between the prompt and the first token."""
        if first is None:
            return ""
        there, alone = self.logprobs.texts.piece(echo.tokens[-1], first), self.logprobs.texts.piece(None, first)
        return there.removesuffix(alone).decode() if alone and there.endswith(alone) else ""


def as_event(body: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body)}\n\n"
