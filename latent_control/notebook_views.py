"""What the public things look like in a notebook: short HTML, every text in it escaped, readable on light and dark
pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

GOLDEN_ANGLE = 137.508
"""Degrees between the hues of neighbouring codes: no two near numbers look alike."""
_ROWS = 20
"""Rows of a generation that are shown."""


def table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Names and values under a title."""
    body = "".join(
        f"<tr><th style='text-align:left'>{escape(n)}</th><td style='text-align:left'>{escape(v)}</td></tr>"
        for n, v in rows
    )
    return f"<table><caption style='text-align:left'><b>{escape(title)}</b></caption>{body}</table>"


def count(value: int) -> str:
    """``0.92 M``, ``134 M``, ``4.1 k``."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def colour(code: int) -> str:
    """A light background for a code."""
    return f"hsl({code * GOLDEN_ANGLE % 360:.0f} 75% 82%)"


def coloured_tokens(rows: Sequence[Sequence[tuple[str, int, float]]], title: str) -> str:
    """Rows of (token, code, log-probability of the code), each token on its code's colour; code -1: none."""
    lines = "".join(f"<div style='margin:2px 0'>{''.join(_token(*part) for part in row)}</div>" for row in rows[:_ROWS])
    more = f"<div>and {len(rows) - _ROWS} more rows</div>" if len(rows) > _ROWS else ""
    return f"<div><b>{escape(title)}</b>{lines}{more}</div>"


def _token(text: str, code: int, logp: float) -> str:
    shown = escape(text.replace("\n", "⏎\n")) or "∅"
    if code < 0:
        return f"<span style='white-space:pre-wrap'>{shown}</span>"
    hint = f"code {code}, probability {2.718281828**logp:.2f}"
    style = f"background:{colour(code)};color:#111;white-space:pre-wrap;padding:1px 3px;margin:0 1px;border-radius:3px"
    return f"<span title='{hint}' style='{style}'>{shown}<sub style='font-size:70%'>{code}</sub></span>"


def bars(shares: Sequence[float], title: str) -> str:
    """How often each code is used as columns of a picture, with the same in words for readers of text."""
    width, height, top = 8 * len(shares), 60, max(shares, default=0.0) or 1.0
    columns = "".join(
        f"<rect x='{8 * code + 1}' y='{height - share / top * height:.1f}' width='6' "
        f"height='{share / top * height:.1f}' "
        f"fill='hsl({code * GOLDEN_ANGLE % 360:.0f} 60% 50%)'><title>code {code}: {share:.1%}</title></rect>"
        for code, share in enumerate(shares)
    )
    label = f"role='img' aria-label='{escape(title, quote=True)}'"
    return f"<div><b>{escape(title)}</b><br><svg {label} width='{width}' height='{height}'>{columns}</svg></div>"
