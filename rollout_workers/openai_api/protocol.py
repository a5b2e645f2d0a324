"""Requests against a served model: its limits, and the rows that a request needs."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.schema import Decode
from latent_control.decoding.guide import is_one_row, make_guide
from latent_control.decoding.stream_rows import RowParams
from latent_control.decoding.token_choice import PLAIN, TokenChoice
from latent_control.decoding.token_scores import TokenScore
from latent_control.distributions import rollout_seed
from latent_control.policies.bank import Blend
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.requests import MOST_ROWS, MOST_TOKENS, Request

MOST_STOPS, LONGEST_STOP = 4, 256
BYTES_PER_TOKEN = 16
"""A prompt with more bytes for each of the model's positions is refused before it is tokenised: text has 2 to 6."""


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
class DecodeRequest(RowParams):
    """One row to decode, with the strings that end it."""

    stop: tuple[str, ...] = ()


@dataclass(kw_only=True)
class DecodedRow:
    """One decoded row, also while it is being decoded: what is new."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    code_logp: list[float] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    """Where they were asked for"""
    codes_left: list[int | None] = field(default_factory=list)
    """As ``NewToken``, where a grammar binds the row"""
    finish_reason: str | None = None

    def add(self, part: DecodedRow) -> None:
        """Go on with new tokens."""
        for name in ("tokens", "codes", "code_logp", "scores", "codes_left"):
            getattr(self, name).extend(getattr(part, name))

    def close(self, text: str, finish_reason: str) -> None:
        """No token follows."""
        self.text, self.finish_reason = text, finish_reason


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
        raise RefusedRequest(
            f"the model {request.model!r:.80} is not served here; {limits.model!r} is", 404, "model",
            code="model_not_found",
        )  # fmt: skip
    rows, wanted = len(prompts) * request.n, [_new_tokens(request, prompt, limits) for prompt in prompts]
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stop) > MOST_STOPS or "" in stop or max(map(len, stop), default=0) > LONGEST_STOP:
        raise RefusedRequest(
            f"stop has {len(stop)} strings: give 1 to {MOST_STOPS}, none of them empty or longer than {LONGEST_STOP} "
            "characters",
            param="stop",
        )
    codes = _each(request.codes, rows, "codes", max(wanted))
    allowed = _without(_each(request.allowed_codes, rows, "allowed_codes", limits.num_actions), codes, rows, limits)
    try:
        make_guide(codes, allowed, rows=rows, num_actions=limits.num_actions, span=limits.span)
    except ValueError as error:
        raise RefusedRequest(
            str(error), param="codes" if str(error).startswith("codes") else "allowed_codes"
        ) from error
    by, choice = _token_choice(request, limits)
    start = secrets.randbits(31) if request.seed is None else request.seed % 2**63
    return [
        DecodeRequest(
            prompt=tuple(prompts[row // request.n]),
            max_tokens=wanted[row // request.n],
            temperature=limits.temperature if request.temperature is None else request.temperature,
            top_k=request.top_k,
            decode=by,
            choice=choice,
            seed=rollout_seed(start, row),
            stop=stop,
            codes=None if codes is None or codes[row] is None else tuple(codes[row]),
            allowed=None if allowed is None or allowed[row] is None else tuple(allowed[row]),
            member=member,
            top_scores=request.top(),
        )
        for row in range(rows)
    ]


def _token_choice(request: Request, limits: ModelLimits) -> tuple[Decode, TokenChoice]:
    """By code or by token, and how tokens are chosen; what is defined over tokens alone is done by token, unless the
    request says by code."""
    temperature = limits.temperature if request.temperature is None else request.temperature
    given = {
        "top_p": 1.0 if request.top_p is None or temperature == 0 else request.top_p,
        "min_p": request.min_p if request.min_p and temperature > 0 else 0.0,
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "bias": _bias(request, limits),
    }
    asked = [name for name, value in given.items() if value != getattr(PLAIN, name)]
    by = request.decode or ("token" if asked else limits.decode)
    if asked and by == "code":
        name = "logit_bias" if asked[0] == "bias" else asked[0]
        raise RefusedRequest(
            f"{name} has a meaning over tokens, and decode=code chooses codes: leave decode out or send decode=token, "
            "where tokens are chosen from the mixture over codes",
            param=name,
        )
    if by == "token" and request.top_k is not None:
        why = f"beside {asked[0]}" if asked and request.decode is None else "with decode=token"
        raise RefusedRequest(
            f"top_k={request.top_k} has no meaning {why}, where no code is sampled: leave it out, or send decode=code "
            "without what is over tokens",
            param="top_k",
        )
    return by, TokenChoice(**given) if asked else PLAIN  # type: ignore[arg-type]


def _bias(request: Request, limits: ModelLimits) -> tuple[tuple[int, float], ...]:
    found = {}
    for token, bias in (request.logit_bias or {}).items():
        if not token.isascii() or not token.isdigit() or len(token) > 9 or int(token) >= limits.vocabulary:
            raise RefusedRequest(
                f"logit_bias has {token!r:.40}: the model's tokens are 0 to {limits.vocabulary - 1}", param="logit_bias"
            )
        found[int(token)] = bias
    return tuple((token, bias) for token, bias in found.items() if bias)


def _new_tokens(request: Request, prompt: Sequence[int], limits: ModelLimits) -> int:
    """New tokens of a row; where the request says none the model's own number, else OpenAI's, or as many as fit."""
    wanted, room = request.limit(), None if limits.positions is None else limits.positions - len(prompt)
    if wanted is None:
        usual = limits.max_tokens or request.usual_tokens
        if usual is None and room is None:
            raise RefusedRequest("max_tokens is missing, and the model has no default", param="max_tokens")
        wanted = min(number for number in (usual, None if room is None else max(1, room)) if number is not None)
    if wanted == 0 and not getattr(request, "echo", False):
        raise RefusedRequest("max_tokens: Input should be greater than or equal to 1, got 0", param="max_tokens")
    _require_fit(prompt, wanted, limits)
    return wanted


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
            code="context_length_exceeded",
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
