"""The same as a figure shows, in a sentence and as a table: for those who do not see it, and for those who want the
numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.pages.charts.axes import label
from pipeline.pages.charts.records import Bars, Curve, Dots, Figure, Lines

ROWS = 12
"""Of a curve's table: places spread evenly over x."""


def number(value: float) -> str:
    """Three places after the point, or four digits of what is large or small; counts as such; a dash for what is
    unknown."""
    if not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) > 1:
        return label(value)
    return f"{value:.3f}" if 0.001 <= abs(value) < 100 or value == 0 else label(value)


def between(low: float, high: float) -> str:
    """``0.123 to 0.456``."""
    return f"{number(low)} to {number(high)}" if math.isfinite(low) and math.isfinite(high) else "–"


def described(figure: Figure) -> str:
    """A figure in a sentence or two."""
    if isinstance(figure, Lines):
        told = [_course(curve, figure.across) for curve in figure.curves]
    elif isinstance(figure, Dots):
        told = [
            f"{name}: " + ", ".join(f"{d.kind} {number(d.value)} ({between(d.low, d.high)})" for d in dots)
            for name, dots in figure.rows
        ]
    else:
        most = max(figure.heights, key=lambda pair: pair[1])
        told = [f"{len(figure.heights)} bars; the highest is {most[0]} with {number(most[1])}"]
        told += [
            f"{name} {number(level)}: {sum(h > level for _, h in figure.heights)} bars" for name, level in figure.levels
        ]
    return "; ".join(told) + (f". {figure.note}" if figure.note else ".")


def _course(curve: Curve, across: str) -> str:
    first, last = (
        f"{number(curve.y[i])}" + (f" ({between(curve.low[i], curve.high[i])})" if curve.low else "") for i in (0, -1)
    )
    low, high = min(curve.y), max(curve.y)
    way = f"from {first} at {across} {label(curve.x[0])} to {last} at {label(curve.x[-1])}"
    return f"{curve.name} goes {way}, between {number(low)} and {number(high)}"


def table(figure: Figure) -> tuple[tuple[str, ...], list[list[str]]]:
    """Head and rows; curves at up to ``ROWS`` places."""
    if isinstance(figure, Lines):
        return _lines(figure)
    if isinstance(figure, Dots):
        kinds = list(dict.fromkeys(dot.kind for _, dots in figure.rows for dot in dots))
        head = ("", *(cell for kind in kinds for cell in (kind, "95 % interval")))
        return head, [
            [name, *(c for d in dots for c in (number(d.value), between(d.low, d.high)))] for name, dots in figure.rows
        ]
    assert isinstance(figure, Bars)
    return ("", "height"), [[name, f"{height:.4g}"] for name, height in figure.heights]


def _lines(figure: Lines) -> tuple[tuple[str, ...], list[list[str]]]:
    head = [figure.across]
    for curve in figure.curves:
        head += [curve.name, "95 % interval"] if curve.low else [curve.name]
    rows = []
    for x in _spread(sorted({x for curve in figure.curves for x in curve.x})):
        row = [label(x)]
        for curve in figure.curves:
            # Curves need not have the same places: the nearest one that is not beyond.
            i = max((i for i, other in enumerate(curve.x) if other <= x), default=None)
            row.append("–" if i is None else number(curve.y[i]))
            row += [] if not curve.low else ["–" if i is None else between(curve.low[i], curve.high[i])]
        rows.append(row)
    return tuple(head), rows


def _spread(places: Sequence[float]) -> list[float]:
    if len(places) <= ROWS:
        return list(places)
    return [places[round(k * (len(places) - 1) / (ROWS - 1))] for k in range(ROWS)]
