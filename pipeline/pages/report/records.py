"""A report as plain data, before it becomes a page. All texts may be hostile; the page escapes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.pages.charts.records import Figure


@dataclass(frozen=True, kw_only=True)
class Table:
    """``Table(title="Cost", head=("stage", "seconds"), rows=[["improve", "31"]])``; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A held-out prompt with the answers of some models: ``answers=(("base", "3+4", False), ("improved", "3*4",
    True))``."""

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
    """``Link(text="explorer.html", target="explorer.html", about="what the codes do")``; without a target it is only
    said."""

    text: str
    target: str
    about: str


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """A part of the page under a heading, in the order of its fields."""

    name: str
    """Its anchor."""
    title: str
    lines: Sequence[str] = ()
    warnings: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
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
    tiles: Sequence[tuple[str, str, str]]
    """What, its value, and how it is meant: "good", "bad" or ""."""
    sections: Sequence[ReportSection]
