"""Records shown by the page and the terminal. ``pages.records.as_data`` makes JSON of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of an answer: ``Token(id=7, text=" 25", code=3, chance=0.61, forced=False)``."""

    id: int
    text: str
    code: int | None = None
    """``None``: the base LM wrote it"""
    chance: float | None = None
    """The policy's own, of this code; ``None`` inside a span"""
    forced: bool = False


@dataclass(frozen=True, kw_only=True)
class AnswerVerdict:
    """The task's verifier on an answer."""

    reward: float | None
    """``None``: it could not judge"""
    success: bool
    problem: str
    """Why it could not"""


@dataclass(frozen=True, kw_only=True)
class SteeringAnswer:
    """An answer, steered or the base LM's."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str
    """"stop" or "length\""""
    verdict: AnswerVerdict | None
    """``None``: the prompt is none of the task's"""


@dataclass(frozen=True, kw_only=True)
class CodeCandidate:
    """A code at one token of an answer."""

    code: int
    chance: float
    """The policy's own"""
    token: int
    """That the code writes here"""
    text: str
    certainty: float
    """Probability of that token under the world model"""
    allowed: bool
    """By what is forbidden at this token and in the whole answer"""


@dataclass(frozen=True, kw_only=True)
class Mass:
    """A token at one place, with all codes that write it."""

    token: int
    text: str
    chance: float
    codes: int
    best: int
    """The likeliest of them"""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """All codes at one token of an answer, the likeliest first, and the tokens they lead to."""

    place: int
    chosen: int
    codes: tuple[CodeCandidate, ...]
    tokens: tuple[Mass, ...]
