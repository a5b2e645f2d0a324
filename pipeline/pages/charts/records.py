"""What is drawn, as plain data. A figure's ``name`` is that of its file; its ``note`` says what the intervals are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = 4
"""The most curves of a figure that differ by colour and dashes."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over x, with their intervals if any: ``Curve(name="reward", x=(1, 2), y=(0.2, 0.3), low=(0.1, 0.2),
    high=(0.3, 0.4))``."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    raw: Sequence[tuple[float, float]] = ()
    """Single measurements behind the curve, drawn faintly."""
    joined: bool = True
    """False: marks with whiskers, no line and no band."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Curves over common axes."""

    name: str
    title: str
    across: str
    """What x is."""
    curves: Sequence[Curve]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A value with its interval: ``Dot(kind="sampled", value=0.6, low=0.5, high=0.7)``."""

    kind: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Dots:
    """Values of several rows below each other, on one axis."""

    name: str
    title: str
    rows: Sequence[tuple[str, Sequence[Dot]]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Heights side by side, in the order given, with level lines across: ``levels=(("alive above", 0.002),)``."""

    name: str
    title: str
    heights: Sequence[tuple[str, float]]
    levels: Sequence[tuple[str, float]] = ()
    note: str = ""


Figure = Lines | Dots | Bars
