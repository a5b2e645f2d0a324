"""Requests of OpenAI's protocol, with codes: their fields, and how a body becomes one. Independent of HTTP and Ray.

A field that is null counts as left out. What would change the reply's meaning and is not supported is refused by name
(``REFUSED``); what says nothing about the reply (``user``, ``metadata``, caching hints) is taken and not used.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

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
from latent_control.decoding.sampling_params import require_temperature
from latent_control.policies.bank import MOST_MIXED
from rollout_workers.openai_api.errors import RefusedRequest

MOST_ROWS, MOST_MESSAGES, MOST_TOOLS, MOST_BIASES, MOST_TOP = 128, 2048, 128, 1024, 20
MOST_TOKENS = 1 << 20
"""Of a row, where the model has no number of positions."""
_MOST_DIGITS = 20
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), "replies are not kept here"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "modalities": ((["text"],), "replies are text"),
    "audio": ((), "replies are text"),
    "prediction": ((), "nothing is decoded ahead"),
    "moderation": ((), "nothing is moderated here"),
    "web_search_options": ((), "there is no web search"),
    "reasoning_effort": (("none",), "the model has no such dial"),
    "verbosity": (("medium",), "the model has no such dial"),
    "functions": (([],), "it is deprecated: send tools"),
    "function_call": (("none", "auto"), "it is deprecated: send tool_choice"),
    "suffix": (("",), "the model continues texts"),
    "repetition_penalty": (
        (1,),
        "it scales logits, and a mixture of codes has probabilities only: send presence_penalty or frequency_penalty",
    ),
}
"""Field -> values at which it changes nothing, and why others are refused."""


class _FirstError(FailFast):
    """Of a list with a million wrong items the first is reported; hashable, as parts of a union are."""

    __hash__ = object.__hash__  # type: ignore[assignment]


_FIRST = _FirstError()
_CodeRow = Annotated[list[StrictInt | None], _FIRST]
_Numbers = Annotated[list[StrictInt], _FIRST]
Codes = _CodeRow | Annotated[list[_CodeRow | None], _FIRST]
Allowed = _Numbers | Annotated[list[_Numbers | None], _FIRST]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), AfterValidator(require_temperature)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Kind = TypeVar("Kind", bound=BaseModel)
TOO_DEEP = "the body is nested too deeply: send an object with the arguments by name"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """``stream_options``."""

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None
    """Taken: there is none"""


class Request(_Strict):
    """The fields common to both kinds of requests."""

    model: StrictStr | None = None
    max_tokens: StrictInt | None = Field(None, ge=0, le=MOST_TOKENS)
    temperature: Temperature | None = None
    """0 takes the most likely codes."""
    top_p: Share | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[StrictStr, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MOST_BIASES)
    top_k: StrictInt | None = Field(None, ge=1)
    """Sample among this many most likely codes."""
    decode: Decode | None = None
    """"code": by way of a code; "token": from the mixture over codes; left out: by token where the request asks for
    what is defined over tokens alone, else as the server does"""
    n: StrictInt = Field(1, ge=1, le=MOST_ROWS)
    seed: StrictInt | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StrictStr | Annotated[list[StrictStr], _FIRST] | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    return_token_ids: StrictBool = False
    """Also the prompt's"""
    user: StrictStr | None = None
    metadata: dict[StrictStr, StrictStr] | None = Field(None, max_length=16)
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    prompt_cache_retention: StrictStr | None = None
    prompt_cache_options: dict[StrictStr, Any] | None = None
    codes: Codes | None = None
    """Codes forced from the first token on, for all rows or for each; null leaves one to the policy."""
    allowed_codes: Allowed | None = None
    """Codes the policy may choose, for all rows or for each."""
    mix: dict[StrictStr, StrictFloat | StrictInt] | None = Field(None, max_length=MOST_MIXED)
    """Of a bank: policies by name with their weights, in place of ``model``"""

    usual_tokens: ClassVar[int | None] = None
    """New tokens where neither request nor model say how many; ``None``: as many as fit"""

    def limit(self) -> int | None:
        """New tokens at most, as far as the request says."""
        return self.max_tokens

    def top(self) -> int | None:
        """How many likeliest tokens log-probabilities are asked for; ``None``: no log-probabilities."""
        raise NotImplementedError


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: StrictStr | Annotated[list[StrictStr], _FIRST] | _Numbers | Annotated[list[_Numbers], _FIRST]
    logprobs: StrictBool | Annotated[StrictInt, Field(ge=0, le=MOST_TOP)] | None = None
    echo: StrictBool = False
    best_of: StrictInt | None = Field(None, ge=1)
    usual_tokens: ClassVar[int | None] = 16

    def top(self) -> int | None:
        """``true`` counts as 0: the tokens' own log-probabilities."""
        return 0 if self.logprobs is True else None if self.logprobs is False else self.logprobs


class ContentPart(BaseModel):
    """A part of a message's content; caching hints beside its text are not used."""

    model_config = ConfigDict(extra="ignore")
    type: StrictStr
    text: StrictStr | None = None
    refusal: StrictStr | None = None


class FunctionCall(_Strict):
    """What a call calls; ``arguments`` are JSON."""

    name: StrictStr
    arguments: StrictStr


class ToolCall(BaseModel):
    """A call in an assistant's turn; some clients number them."""

    model_config = ConfigDict(extra="ignore")
    id: StrictStr
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Strict):
    """One turn of a chat; what of an earlier reply a client sends back is taken."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Annotated[list[ContentPart], _FIRST] | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], _FIRST] | None = Field(None, max_length=MOST_TOOLS)
    tool_call_id: StrictStr | None = None
    refusal: StrictStr | None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None


class FunctionDefinition(_Strict):
    """A function that the model may call."""

    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[StrictStr, Any] | None = None
    strict: StrictBool | None = None


class Tool(_Strict):
    """A tool; there are functions."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Strict):
    """The function of a tool choice."""

    name: StrictStr


class NamedTool(_Strict):
    """A tool choice by name."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Strict):
    """The schema of a response format."""

    name: Annotated[StrictStr, Field(max_length=64)]
    description: StrictStr | None = None
    schema_: dict[StrictStr, Any] | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(_Strict):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], _FIRST] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=MOST_TOP)
    tools: Annotated[list[Tool], _FIRST] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    response_format: ResponseFormat | None = None

    def limit(self) -> int | None:
        """As ``Request``; two different numbers are refused."""
        both = {number for number in (self.max_tokens, self.max_completion_tokens) if number is not None}
        if len(both) > 1:
            raise RefusedRequest("max_tokens and max_completion_tokens differ: send one", param="max_tokens")
        return next(iter(both), None)

    def top(self) -> int | None:
        """As ``Request``."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RefusedRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def callable(self) -> list[Tool]:
        """The tools that may be called."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    def must_call(self) -> bool:
        """Whether the reply has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


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
        raise RefusedRequest(TOO_DEEP) from error
    except RefusedRequest:
        raise
    except ValueError as error:
        raise RefusedRequest(f"the body is not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0][:80]
        raise RefusedRequest(f"{twice} occurs twice: send it once", param=twice)
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
    fields = kind.model_fields
    content = {name: value for name, value in content.items() if value is not None or name not in fields}
    if issubclass(kind, Request):
        for name, (neutral, reason) in REFUSED.items():
            value = content.pop(name, None)
            same = (type(value) is type(one) and value == one for one in _with_floats(neutral))
            if value is not None and not any(same):
                raise RefusedRequest(f"{name}={json.dumps(value)[:80]} is not supported: {reason}", param=name)
    try:
        found = kind.model_validate(content)
        if isinstance(found, Request) and found.stream_options is not None and not found.stream:
            raise RefusedRequest("stream_options belong to a stream: send stream=true", param="stream_options")
        return found
    except ValidationError as error:
        # a typo explains what is missing
        wrong = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        first, name = wrong[0], str(wrong[0]["loc"][0])[:80]
        # Of a union each member has its say; the argument's name is what they share.
        said = "; ".join(dict.fromkeys(e["msg"] for e in wrong if e["loc"][0] == first["loc"][0]))
        outer = first["type"] == "extra_forbidden" and len(first["loc"]) == 1
        known = f"; known are {', '.join(fields)}" if outer else ""
        raise RefusedRequest(
            f"{_place(first['loc'])}: {said}, got {_shown(content, name)}{known}", param=name
        ) from error


def _with_floats(neutral: tuple[Any, ...]) -> tuple[Any, ...]:
    """1.0 says what 1 says."""
    return (*neutral, *(float(one) for one in neutral if type(one) is int))


_NESTED = {"messages", "tools", "tool_choice", "response_format", "stream_options"}
_UNIONS = re.compile(r"str|int|bool|list\b.*|dict\b.*|literal\b.*|constrained.*|.*\[.*|[A-Z].*")
"""What pydantic calls the members of a union in a place."""


def _place(loc: tuple[int | str, ...]) -> str:
    """Where in the request: ``messages.3.content``."""
    name = str(loc[0])[:80]
    if name not in _NESTED:
        return name
    return ".".join([name, *(str(part)[:80] for part in loc[1:6] if not _UNIONS.fullmatch(str(part)))])


def _shown(content: dict[str, Any], name: str) -> str:
    return json.dumps(content[name])[:80] if name in content else "nothing"
