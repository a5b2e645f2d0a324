"""HTML pages in the project's one look (the explorer's style sheet): one file each, light and dark, nothing is loaded
from elsewhere.

Texts are escaped by Jinja, whatever they are; a Content-Security-Policy lets nothing run, and no style but the page's
own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from configs.plain_text import UNSEEN
from pipeline.pages.charts.draw import style as chart_style
from pipeline.pages.charts.draw import svg
from pipeline.pages.charts.records import Curve, Figure, Lines
from pipeline.pages.charts.words import table
from pipeline.pages.html import asset, source

MOST_ROWS = 64
"""Of a figure's table."""
Points = Sequence[tuple[float, float]]


def printable(text: str) -> str:
    """A text of a model or a user with nothing invisible in it; lines stay lines."""
    return UNSEEN.sub("\ufffd", text)


def rendered(template: str, **values: Any) -> Markup:
    """A Jinja template with every value escaped that is no ``Markup``."""
    from jinja2 import Environment

    return Markup(
        Environment(autoescape=True, trim_blocks=True).from_string(template).render(printable=printable, **values)
    )


def document(title: str, body: Markup, *, style: str = "", images: bool = False) -> str:
    """A whole page around ``body``, in ASCII. ``images``: pictures inside of it (``data:``) may show."""
    sheet = "\n".join((asset("explorer.css"), chart_style(), style))
    policy = f"default-src 'none'; style-src {source(sheet)}; base-uri 'none'; form-action 'none'" + (
        "; img-src data:" if images else ""
    )
    text = rendered(
        asset("frame.html", "pipeline.pages"),
        title=printable(title),
        style=Markup(sheet),
        policy=Markup(policy),
        body=body,
    )
    return text.encode("ascii", "xmlcharrefreplace").decode()


def page(
    title: str,
    *,
    lines: Sequence[str] = (),
    tables: Sequence[Mapping[str, Any]] = (),
    charts: Sequence[str] = (),
    flags: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A simple page. ``tables``: ``{"title", "head", "rows"}``; ``charts``: from ``chart``; every text is escaped."""
    shown = [Markup(chart) for chart in charts]  # made here, escaped when they were
    parts = {"lines": lines, "tables": tables, "charts": shown, "flags": flags}
    return document(title, rendered(asset("page.html", "pipeline.pages"), title=printable(title), **parts))


def figure(drawn: Figure) -> Markup:
    """A figure with its caption, its picture and the same as a table."""
    head, rows = table(drawn)
    return rendered(
        asset("figure.html", "pipeline.pages"), figure=drawn, svg=svg(drawn), head=head, rows=rows, most=MOST_ROWS
    )


def chart(title: str, across: str, curves: Mapping[str, Points]) -> str:
    """Curves of (x, y) points over common axes; curves without points are left out, empty text when all are."""
    kept = [
        Curve(name=name, x=[x for x, _ in points], y=[y for _, y in points])
        for name, points in curves.items()
        if points
    ]
    name = re.sub(r"[^a-z0-9]+", "-", title.lower())
    return figure(Lines(name=name, title=title, across=across, curves=kept)) if kept else ""
