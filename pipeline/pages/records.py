"""What pages show, as plain data, before it becomes a page. All texts may be hostile; pages show them as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

DIGITS = 4
"""Of every number but the ones that name something: what a page of this kind can show."""


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
    kind: str = "line"
    """``line`` with a band, ``marks`` with whiskers, or ``bars``."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Curves over common axes. ``name`` is unique on a page; ``note`` says what the intervals are."""

    name: str
    title: str
    across: str
    """What x is."""
    curves: Sequence[Curve]
    note: str = ""
    labels: Sequence[str] = ()
    """Names of the places x = 0, 1, ..., where x is no number."""
    stacked: bool = False


Cell = str | Mapping[str, Any]
"""A text; ``{"value", "low", "high", "from", "to"}``, an interval drawn on a scale; ``{"text", "beside"}``, a text in
which is marked where it differs from another one; ``{"text", "target"}``, a link."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """``Table(title="Cost", head=("stage", "seconds"), rows=[["improve", "31"]])``; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with answers of some models: ``answers=(("base", "3+4", False), ("improved", "3*4", True))``."""

    prompt_id: str
    prompt: str
    answers: Sequence[tuple[str, str, bool]]
    """Model, response, success."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Examples of one kind. ``total`` counts those that are not shown, too."""

    title: str
    total: int
    examples: Sequence[Example]


@dataclass(frozen=True, kw_only=True)
class Link:
    """``Link(text="explorer.html", target="explorer.html", about="what the codes do")``."""

    text: str
    target: str
    about: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and what it shows: ``Picture(source="data:image/png;base64,...", words="...")``."""

    source: str
    words: str


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """A part of the page under a heading, in the order of its fields."""

    name: str
    """Its anchor."""
    title: str
    warnings: Sequence[str] = ()
    lines: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    galleries: Sequence[Gallery] = ()
    commands: Sequence[tuple[str, str]] = ()
    """What it is for, and the lines to type."""
    links: Sequence[Link] = ()
    files: Sequence[tuple[str, str]] = ()
    """Name and text, folded away."""


@dataclass(frozen=True, kw_only=True)
class ReportPage:
    """The whole page."""

    title: str
    tiles: Sequence[tuple[str, str, str]] = ()
    """What, its value, and how it is meant: "good", "bad" or ""."""
    sections: Sequence[ReportSection]


def as_data(value: Any) -> Any:
    """Records as JSON-able data: objects by field, floats rounded to ``DIGITS`` significant digits, ``None`` for what
    is no number."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_data(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: as_data(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_data(item) for item in value]
    return value


def number(value: float) -> str:
    """Three places after the point, or four digits of what is large or small; counts as such; a dash for what is
    unknown."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000 and value == round(value):
        return f"{value:,.0f}"
    whole = value == int(value) and abs(value) > 1
    return f"{value:.3f}" if not whole and (0.001 <= abs(value) < 100 or value == 0) else f"{value:.4g}"


def between(low: float, high: float) -> str:
    """``0.123 to 0.456``."""
    return f"{number(low)} to {number(high)}" if math.isfinite(low) and math.isfinite(high) else "–"
