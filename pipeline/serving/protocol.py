"""Requests and replies of completions: OpenAI's protocol with codes. Independent of HTTP and Ray."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from configs.schema import Decode
from latent_control.decoding.guide import is_one_row, make_guide
from latent_control.decoding.sampling_params import require_temperature
from latent_control.distributions import rollout_seed
from latent_control.policies.bank import MOST_MIXED, Blend
from latent_control.text import spoken_text, whole_characters

# Arguments of OpenAI's that mean nothing here, at the values at which they mean nothing there either.
NEUTRAL: dict[str, Any] = {
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "best_of": 1,
    "echo": False,
    "suffix": "",
}
MOST_ROWS, MOST_STOPS, LONGEST_STOP, MOST_MESSAGES = 128, 4, 256, 2048
MOST_TOKENS = 1 << 20
"""Of a row, where the model has no number of positions."""
BYTES_PER_TOKEN = 16
"""A prompt with more bytes for each of the model's positions is refused before it is tokenised: text has 2 to 6."""
_LONGEST_ERROR, _MOST_DIGITS = 1000, 20


class _FirstError(FailFast):
    """Of a list with a million wrong items the first is reported; hashable, as parts of a union are."""

    __hash__ = object.__hash__  # type: ignore[assignment]


_FIRST = _FirstError()
_CodeRow = Annotated[list[StrictInt | None], _FIRST]
_Numbers = Annotated[list[StrictInt], _FIRST]
Codes = _CodeRow | Annotated[list[_CodeRow | None], _FIRST]
Allowed = _Numbers | Annotated[list[_Numbers | None], _FIRST]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), AfterValidator(require_temperature)]
Kind = TypeVar("Kind", bound=BaseModel)


class RefusedRequest(ValueError):
    """A request that cannot be served, with its HTTP status and the argument that is wrong."""

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's format; what it quotes of the request is cut, and whole characters."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        said, param = (text and whole_characters(text[:_LONGEST_ERROR]) for text in (str(self), self.param))
        return {"error": {"message": said, "type": kind, "param": param, "code": None}}


class Request(BaseModel):
    """The fields common to both kinds of requests."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    max_tokens: StrictInt | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: Temperature | None = None
    """0 takes the most likely codes."""
    top_k: StrictInt | None = Field(None, ge=1)
    """Sample among this many most likely codes."""
    decode: Decode | None = None
    """"code": by way of a code; "token": from the mixture over codes; left out: as the server does"""
    n: StrictInt = Field(1, ge=1, le=MOST_ROWS)
    seed: StrictInt | None = Field(None, ge=0, lt=2**63)
    stop: StrictStr | Annotated[list[StrictStr], _FIRST] | None = None
    stream: StrictBool = False
    user: StrictStr | None = None
    codes: Codes | None = None
    """Codes forced from the first token on, for all rows or for each; null leaves one to the policy."""
    allowed_codes: Allowed | None = None
    """Codes the policy may choose, for all rows or for each."""
    mix: dict[StrictStr, StrictFloat | StrictInt] | None = Field(None, max_length=MOST_MIXED)
    """Of a bank: policies by name with their weights, in place of ``model``"""


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: StrictStr | Annotated[list[StrictStr], _FIRST] | _Numbers | Annotated[list[_Numbers], _FIRST]


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: StrictStr
    content: StrictStr


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], _FIRST] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=MOST_TOKENS)


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """Limits of the served model: ``ModelLimits(model="first", num_actions=64, span=1, positions=2048, max_tokens=16,
    vocabulary=49152)``."""

    model: str
    num_actions: int
    span: int
    positions: int | None
    """Tokens of prompt and answer together; ``None``: unknown"""
    max_tokens: int | None
    """Where a request says none; ``None``: it must"""
    vocabulary: int
    temperature: float = 0.0
    """Where a request says none"""
    decode: Decode = "code"
    """Where a request says none"""
    banned: tuple[int, ...] = ()
    """Codes that no request may choose"""


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """One row to decode."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_k: int | None
    decode: Decode
    seed: int
    stop: tuple[str, ...] = ()
    codes: tuple[int | None, ...] | None = None
    allowed: tuple[int, ...] | None = None
    member: Blend | None = None
    """Of a bank: whose policy chooses"""


@dataclass(kw_only=True)
class DecodedRow:
    """One decoded row, also while it is being decoded."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    code_logp: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def extras(self) -> dict[str, Any]:
        """Fields of a reply beyond OpenAI's: which code produced each token."""
        return {"codes": self.codes, "code_logprobs": [round(x, 6) for x in self.code_logp], "token_ids": self.tokens}


async def read_body(chunks: AsyncIterable[bytes], most: int) -> bytes:
    """A body as it comes, whatever length it was said to have; ``RefusedRequest`` at more than ``most`` bytes."""
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > most:
            raise RefusedRequest(f"the body has more than {most} bytes: send fewer prompts at once", 413)
    return bytes(body)


def parse(body: bytes, kind: type[Kind]) -> Kind:
    """The request in a body.

    Raises:
        RefusedRequest: it is no JSON, or says something that cannot be done.
    """
    try:
        content = json.loads(body, object_pairs_hook=_object, parse_int=_integer)
        if not isinstance(content, dict):
            raise RefusedRequest(
                f"the body is a JSON {type(content).__name__}; send an object with the arguments by name"
            )
        return _validated(content, kind)
    except RecursionError as error:
        raise RefusedRequest("the body is nested too deeply: send an object with the arguments by name") from error
    except RefusedRequest:
        raise
    except ValueError as error:
        raise RefusedRequest(f"the body is no JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0][:80]
        raise RefusedRequest(f"{twice} stands there twice: send it once", param=twice)
    return found


def _integer(digits: str) -> int | float:
    """No argument takes a whole number of so many digits: as a float it is refused by the argument's name."""
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def _require_characters(content: Mapping[str, Any]) -> None:
    """JSON can spell halves of characters, which no text has."""
    for name, value in content.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RefusedRequest(
                f"{name[:80]} has half of a character (a lone surrogate): send whole ones", param=name[:80]
            ) from error


def _validated(content: dict[str, Any], kind: type[Kind]) -> Kind:
    _require_characters(content)
    for name, neutral in NEUTRAL.items():
        if (value := content.pop(name, None)) not in (None, neutral):
            raise RefusedRequest(
                f"{name}={json.dumps(value)[:80]} is not supported: codes are sampled by temperature and top_k",
                param=name,
            )
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        # a typo explains what is missing
        found = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        first, name = found[0], str(found[0]["loc"][0])[:80]
        # Of a union each member has its say; the argument's name is what they share.
        said = "; ".join(dict.fromkeys(e["msg"] for e in found if e["loc"][0] == first["loc"][0]))
        known = f"; known are {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise RefusedRequest(f"{name}: {said}, got {_shown(content, name)}{known}", param=name) from error


def _shown(content: dict[str, Any], name: str) -> str:
    return json.dumps(content[name])[:80] if name in content else "nothing"


def require_bounds(prompts: Sequence[str | Sequence[int]], n: int, limits: ModelLimits, param: str) -> None:
    """``RefusedRequest`` where there are too many rows, or a prompt is too long to be tokenised."""
    rows, most = len(prompts) * n, (limits.positions or MOST_TOKENS) * BYTES_PER_TOKEN
    if not 1 <= rows <= MOST_ROWS:
        raise RefusedRequest(
            f"{len(prompts)} prompts x n={n} are {rows} rows: send 1 to {MOST_ROWS} in a request", param=param
        )
    if (longest := max((len(prompt.encode()) for prompt in prompts if isinstance(prompt, str)), default=0)) > most:
        raise RefusedRequest(
            f"a prompt of {longest} bytes is more than the model's {limits.positions or MOST_TOKENS} positions hold: "
            f"at most {most} bytes are read",
            param=param,
        )


def decode_requests(
    request: Request, prompts: Sequence[Sequence[int]], limits: ModelLimits, member: Blend | None = None
) -> list[DecodeRequest]:
    """The rows that a request needs: ``n`` of each prompt (token ids), one after the other; of a bank, ``member``
    chooses their codes.

    Raises:
        RefusedRequest: another model is asked for, a number does not fit it, or there are too many rows.
    """
    if member is None and request.mix is not None:
        raise RefusedRequest("mix names policies of a bank, and one model is served here: leave it out", param="mix")
    if member is None and request.model is not None and request.model != limits.model:
        raise RefusedRequest(f"the model {request.model!r:.80} is not served here; {limits.model!r} is", 404, "model")
    rows = len(prompts) * request.n
    wanted = request.max_tokens or getattr(request, "max_completion_tokens", None) or limits.max_tokens
    if wanted is None:
        raise RefusedRequest("max_tokens is missing, and the model has no default", param="max_tokens")
    for prompt in prompts:
        _require_fit(prompt, wanted, limits)
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stop) > MOST_STOPS or "" in stop or max(map(len, stop), default=0) > LONGEST_STOP:
        raise RefusedRequest(
            f"stop has {len(stop)} strings: give 1 to {MOST_STOPS}, none of them empty or longer than {LONGEST_STOP} "
            "characters",
            param="stop",
        )
    codes = _each(request.codes, rows, "codes", wanted)
    allowed = _without(_each(request.allowed_codes, rows, "allowed_codes", limits.num_actions), codes, rows, limits)
    try:
        make_guide(codes, allowed, rows=rows, num_actions=limits.num_actions, span=limits.span)
    except ValueError as error:
        raise RefusedRequest(
            str(error), param="codes" if str(error).startswith("codes") else "allowed_codes"
        ) from error
    by = request.decode or limits.decode
    if by == "token" and request.top_k is not None:
        raise RefusedRequest(
            f"top_k={request.top_k} has no meaning with decode=token, where no code is sampled: leave it out, or send "
            "decode=code",
            param="top_k",
        )
    start = secrets.randbits(31) if request.seed is None else request.seed
    return [
        DecodeRequest(
            prompt=tuple(prompts[row // request.n]),
            max_tokens=wanted,
            temperature=limits.temperature if request.temperature is None else request.temperature,
            top_k=request.top_k,
            decode=by,
            seed=rollout_seed(start, row),
            stop=stop,
            codes=None if codes is None or codes[row] is None else tuple(codes[row]),
            allowed=None if allowed is None or allowed[row] is None else tuple(allowed[row]),
            member=member,
        )
        for row in range(rows)
    ]


def _require_fit(prompt: Sequence[int], wanted: int, limits: ModelLimits) -> None:
    if not prompt:
        raise RefusedRequest("a prompt has no tokens: send some text", param="prompt")
    if unknown := [token for token in prompt if not 0 <= token < limits.vocabulary]:
        raise RefusedRequest(
            f"the prompt has the token {unknown[0]}: the model's are 0 to {limits.vocabulary - 1}", param="prompt"
        )
    if limits.positions is not None and len(prompt) + wanted > limits.positions:
        raise RefusedRequest(
            f"a prompt of {len(prompt)} tokens and max_tokens={wanted} are more than the model's {limits.positions} "
            "positions: shorten one of them",
            param="max_tokens",
        )


def _without(allowed: list[Any] | None, codes: list[Any] | None, rows: int, limits: ModelLimits) -> list[Any] | None:
    """Allowed codes of each row without those that are banned for all."""
    banned = set(limits.banned)
    if not banned:
        return allowed
    if wrong := [code for row in codes or [] for code in row or [] if code in banned]:
        raise RefusedRequest(f"codes has {wrong[0]}, which is banned here for all", param="codes")
    every = range(limits.num_actions)
    left = [[code for code in (row or every) if code not in banned] for row in allowed or [None] * rows]
    if not all(left):
        raise RefusedRequest(
            f"allowed_codes leaves a row no code: {', '.join(map(str, limits.banned))} are banned here for all",
            param="allowed_codes",
        )
    return left


def _each(given: Any, rows: int, name: str, most: int) -> list[Any] | None:
    """One entry of at most ``most`` codes for each row, of what was given for all, for each prompt, or for each row."""
    if given is None:
        return None
    entries = [given] if is_one_row(given, name) else given
    if rows % len(entries):
        raise RefusedRequest(
            f"{name} is given for {len(entries)} rows, but there are {rows}: give one list for all, or one for each",
            param=name,
        )
    if (longest := max((len(entry) for entry in entries if entry is not None), default=0)) > most:
        raise RefusedRequest(f"{name} has {longest} codes for a row: give at most {most}", param=name)
    return [entry for entry in entries for _ in range(rows // len(entries))]


class TextStream:
    """The text of a growing row of tokens: what of it can be shown already, and whether a stop string has come."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> None:
        """Take one more token."""
        self.tokens.append(token)
        self.text = spoken_text(self.tokenizer, self.tokens)
        found = [place for stop in self.stop if (place := self.text.find(stop)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def safe(self) -> str:
        """Without an end that may still become another character or a stop string."""
        if self.stopped:
            return self.text
        held = len(self.text) - len(self.text.rstrip("\ufffd"))
        for stop in self.stop:
            held = max([held, *(size for size in range(1, len(stop)) if self.text.endswith(stop[:size]))])
        return self.text[: len(self.text) - held]


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Formats the replies to one request."""

    chat: bool
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[DecodedRow], prompt_tokens: int) -> dict[str, Any]:
        """The reply with all rows."""
        choices = [
            {
                "index": index,
                **self._said(answer.text, "message"),
                "finish_reason": answer.finish_reason,
                "logprobs": None,
                **answer.extras(),
            }
            for index, answer in enumerate(answers)
        ]
        new = sum(len(answer.tokens) for answer in answers)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new}
        return self._head("") | {"choices": choices, "usage": usage}

    def piece(self, index: int, text: str, part: DecodedRow) -> dict[str, Any]:
        """One event of a stream: what is new in row ``index``."""
        extras = {"codes": part.codes, "token_ids": part.tokens}
        return self._head(".chunk") | {
            "choices": [
                {
                    "index": index,
                    **self._said(text, "delta"),
                    "finish_reason": part.finish_reason,
                    "logprobs": None,
                    **extras,
                }
            ]
        }

    def _said(self, text: str, place: str) -> dict[str, Any]:
        return {place: {"role": "assistant", "content": text}} if self.chat else {"text": text}

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
