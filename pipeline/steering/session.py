"""The state of a terminal session and its changes by command, independent of models and screens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pipeline.steering.request import SteeringRequest

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


@dataclass(frozen=True, kw_only=True)
class Session:
    """``Session(prompt="3 5 7", codes=(3, None, 17), forbidden=(5,))``; every change is a new one."""

    prompt: str | None = None
    codes: tuple[int | None, ...] = ()
    """Forced by place: decided, or kept as they stood before a token that was regenerated from"""
    allowed: tuple[int, ...] | None = None
    forbidden: tuple[int, ...] = ()
    forbidden_at: dict[int, tuple[int, ...]] = field(default_factory=dict)
    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    @property
    def steered(self) -> bool:
        """Whether anything is steered."""
        return bool(self.codes or self.forbidden or self.forbidden_at or self.allowed is not None)

    def request(self) -> SteeringRequest:
        """What this asks for; pydantic's ``ValidationError`` (a ``ValueError``) where a number is out of range."""
        assert self.prompt is not None
        return SteeringRequest(
            prompt=self.prompt,
            codes=list(self.codes),
            allowed_codes=None if self.allowed is None else list(self.allowed),
            forbidden_codes=list(self.forbidden),
            forbidden_at={place: list(codes) for place, codes in self.forbidden_at.items()},
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
        )

    def free(self) -> Session:
        """Nothing decided."""
        return replace(self, codes=(), allowed=None, forbidden=(), forbidden_at={})

    def at(self, place: int, code: int, shown: Sequence[int]) -> Session:
        """``code`` forced at token ``place``; the codes ``shown`` before it stay, what comes after is free."""
        return replace(self, codes=(*shown[:place], code), forbidden_at=self._barred(place))

    def start_again(self, place: int, shown: Sequence[int], barred: Sequence[int] = ()) -> Session:
        """The policy chooses from token ``place`` on, there not among ``barred``; the codes ``shown`` before it
        stay."""
        kept = self._barred(place)
        if barred:
            kept[place] = (*self.forbidden_at.get(place, ()), *barred)
        return replace(self, codes=tuple(shown[:place]), forbidden_at=kept)

    def _barred(self, place: int) -> dict[int, tuple[int, ...]]:
        return {at: codes for at, codes in self.forbidden_at.items() if at < place}
