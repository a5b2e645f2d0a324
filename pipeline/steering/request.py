"""Requests of steering: a prompt and the codes decided for its answer, checked before anything is decoded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from latent_control.decoding.guide import make_guide
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.protocol import DecodeRequest, ModelLimits, decode_requests
from rollout_workers.openai_api.requests import CompletionRequest, Temperature

MOST_CHARACTERS, MOST_NEW_TOKENS = 20_000, 1024
MOST_CODES = 100_000
"""Numbers of one command."""


def codes_of(text: str, what: str, *, gaps: bool = False) -> list[int | None]:
    """``"3,5,10-12"`` as numbers; with ``gaps`` ``"3,_,17"``, where ``_`` leaves a code to the policy.

    Raises:
        ValueError: something else.
    """
    found: list[int | None] = []
    for part in re.split(r"[\s,]+", text.strip()):
        span = re.fullmatch(r"(\d{1,6})-(\d{1,6})", part)
        if gaps and part == "_":
            found.append(None)
        elif part.isdecimal() and len(part) <= 6:
            found.append(int(part))
        elif span and not gaps and int(span[2]) - int(span[1]) + len(found) < MOST_CODES:
            found += range(int(span[1]), int(span[2]) + 1)
        elif part:
            example = "3,_,17" if gaps else "3,5,10-12"
            raise ValueError(f"{what}: {part[:40]!r} is not a code; write numbers with commas, {example}")
    return found


def plain_codes(text: str, what: str) -> list[int]:
    """``codes_of`` without gaps."""
    return [code for code in codes_of(text, what) if code is not None]


class SteeringRequest(BaseModel):
    """One answer, and all that determines it: the same request gets the same answer.

    ``SteeringRequest(prompt="3 7 25 -> 29 :", codes=[5, None, 2], forbidden_codes=[9], forbidden_at={3: [1, 4]})``
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    prompt: StrictStr = Field(max_length=MOST_CHARACTERS)
    codes: list[StrictInt | None] = Field(default_factory=list, max_length=MOST_NEW_TOKENS)
    """Forced, from the first token on; null leaves one to the policy"""
    allowed_codes: list[StrictInt] | None = None
    """Among which the policy may choose, in the whole answer; null: all"""
    forbidden_codes: list[StrictInt] = Field(default_factory=list)
    """That it may not choose, in the whole answer"""
    forbidden_at: dict[int, list[StrictInt]] = Field(default_factory=dict)
    """That it may not choose at one token"""
    max_tokens: StrictInt | None = Field(None, ge=1, le=MOST_NEW_TOKENS)
    temperature: Temperature = 0.0
    """0 takes the likeliest codes"""
    top_k: StrictInt | None = Field(None, ge=1)
    seed: StrictInt = Field(0, ge=0, lt=2**63)

    @property
    def steered(self) -> bool:
        """Whether anything is steered."""
        return bool(self.codes or self.forbidden_codes or self.forbidden_at or self.allowed_codes is not None)

    def key(self) -> str:
        """Equal for equal requests."""
        return self.model_dump_json(include=set(SteeringRequest.model_fields))

    def but(self, **changes: Any) -> SteeringRequest:
        """The same with ``changes``; pydantic's ``ValidationError`` (a ``ValueError``) where one is out of range."""
        return SteeringRequest.model_validate(self.model_dump(include=set(SteeringRequest.model_fields)) | changes)

    def free(self) -> SteeringRequest:
        """Nothing decided."""
        return self.but(codes=[], allowed_codes=None, forbidden_codes=[], forbidden_at={})

    def go_on(self, place: int, codes: Sequence[int], barred: Sequence[int] = ()) -> SteeringRequest:
        """From token ``place`` on as ``codes`` say (those before ``place`` included), then as the policy chooses, at
        ``place`` not among ``barred``."""
        kept = {at: some for at, some in self.forbidden_at.items() if at < place}
        if barred:
            kept[place] = [*self.forbidden_at.get(place, ()), *barred]
        return self.but(codes=list(codes), forbidden_at=kept)


class CandidatesRequest(SteeringRequest):
    """A request, and the token of its answer that is asked about."""

    place: StrictInt = Field(ge=0)


def decode_request(
    request: SteeringRequest, prompt: Sequence[int], limits: ModelLimits
) -> tuple[DecodeRequest, Mapping[int, Sequence[int]]]:
    """The row to decode for a request whose prompt has these token ids, and the codes barred by place.

    Raises:
        RefusedRequest: a code does not exist, is forced where it is forbidden or changes inside its span, or none is
            left to choose; the prompt is empty, or does not fit the model.
    """
    if not request.prompt.strip():
        raise RefusedRequest("prompt is empty: type some text", param="prompt")
    allowed = _allowed(request, limits.num_actions)
    completion = CompletionRequest.model_validate(
        {
            "prompt": list(prompt),
            # Codes for tokens that will not be written are kept by the page, where a shorter answer is asked for.
            "codes": list(request.codes)[: request.max_tokens or limits.max_tokens] or None,
            "allowed_codes": allowed,
            **request.model_dump(include={"max_tokens", "temperature", "top_k", "seed"}),
        }
    )
    (ask,) = decode_requests(completion, [prompt], limits)
    if beyond := [place for place in request.forbidden_at if not 0 <= place < MOST_NEW_TOKENS]:
        raise RefusedRequest(
            f"forbidden_at has place {str(beyond[0])[:20]}: tokens are numbered from 0 to {MOST_NEW_TOKENS - 1}",
            param="forbidden_at",
        )
    try:
        make_guide(
            ask.codes,
            ask.allowed,
            rows=1,
            num_actions=limits.num_actions,
            span=limits.span,
            barred=request.forbidden_at,
        )
    except ValueError as error:
        raise RefusedRequest(str(error).replace("barred", "forbidden_at"), param="forbidden_at") from error
    return ask, request.forbidden_at


def _allowed(request: SteeringRequest, count: int) -> list[int] | None:
    """Allowed codes without forbidden ones; ``None``: all."""
    for name in ("allowed_codes", "forbidden_codes"):
        if unknown := [code for code in getattr(request, name) or () if not 0 <= code < count]:
            raise RefusedRequest(f"{name} has {unknown[0]}: the model's codes are 0 to {count - 1}", param=name)
    if request.allowed_codes is None and not request.forbidden_codes:
        return None
    allowed = range(count) if request.allowed_codes is None else request.allowed_codes
    forbidden = set(request.forbidden_codes)
    left = [code for code in dict.fromkeys(allowed) if code not in forbidden]
    if not left:
        raise RefusedRequest("no code is left: forbid fewer codes, or allow more", param="forbidden_codes")
    if clash := [code for code in request.codes if code is not None and 0 <= code < count and code not in left]:
        raise RefusedRequest(
            f"codes forces code {clash[0]}, which is forbidden in the whole answer: take one of the two back",
            param="codes",
        )
    return left
