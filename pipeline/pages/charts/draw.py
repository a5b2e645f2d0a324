"""Figures as SVG. Colours and letters are in ``charts.css``: inside of a page, or put in where the picture is a file of
its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.resources import files

from markupsafe import Markup

from pipeline.pages.charts.axes import LEFT, RIGHT, TOP, WIDTH, Axis, label, ticks
from pipeline.pages.charts.records import COLOURS, Bars, Curve, Dot, Dots, Figure, Lines
from pipeline.pages.charts.words import described

_HEIGHT, _ROW = 190, 34
_TEXT = Markup('<text x="{}" y="{}" class="{}">{}</text>')
_LINE = Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>')
_FRAME = Markup(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{broad}" height="{high}" '
    'class="chart" role="img" aria-labelledby="{name}-title {name}-words"><title '
    'id="{name}-title">{title}</title><desc id="{name}-words">{words}</desc>{style}{body}</svg>'
)
# Across the file alone there is no page to lend it a background.
_ALONE = Markup('<style>{}</style><rect width="{}" height="{}" class="paper"/>')


def style() -> str:
    """The style sheet of every figure."""
    return (files("pipeline.pages.charts") / "charts.css").read_text(encoding="utf-8")


def svg(figure: Figure, *, alone: bool = False) -> Markup:
    """The picture; ``alone``: as a file of its own, with its style and a background."""
    draw = {Lines: _lines, Dots: _dots, Bars: _bars}[type(figure)]
    body, height = draw(figure)  # type: ignore[operator]
    dress = _ALONE.format(Markup(style()), WIDTH, height) if alone else ""
    scale = 2 if alone else 1  # viewers show a file at its own size
    return _FRAME.format(
        broad=scale * WIDTH,
        high=scale * height,
        width=WIDTH,
        height=height,
        name=figure.name,
        title=figure.title,
        words=described(figure),
        style=dress,
        body=Markup("").join(body),
    )


def _lines(figure: Lines) -> tuple[list[Markup], int]:
    xs = [x for curve in figure.curves for x in curve.x]
    ys = [
        y
        for curve in figure.curves
        for y in (*curve.y, *curve.low, *curve.high, *(y for _, y in curve.raw))
        if math.isfinite(y)
    ]
    across = Axis(ticks=_inside(min(xs), max(xs)), start=LEFT, end=RIGHT)
    up = Axis(ticks=ticks(min(ys), max(ys), 5), start=_HEIGHT, end=TOP)
    parts = [*_grid(up), *_across(across, figure.across, _HEIGHT)]
    for place, curve in enumerate(figure.curves):
        parts += _curve(curve, across, up, f"c{place % COLOURS}")
    return [*parts, *_legend([curve.name for curve in figure.curves], _HEIGHT + 46)], _HEIGHT + 40 + 16 * math.ceil(
        len(figure.curves) / 2
    )


def _inside(low: float, high: float) -> list[float]:
    """The ends as they are, round numbers between."""
    if low == high:
        return [low - 0.5, low + 0.5]
    near = (high - low) / 12
    return [low, *(t for t in ticks(low, high) if low + near < t < high - near), high]


def _grid(up: Axis) -> Iterator[Markup]:
    for tick in up.ticks:
        yield _LINE.format(LEFT, up.at(tick), RIGHT, up.at(tick), "grid")
        yield _TEXT.format(LEFT - 5, up.at(tick) + 4, "end", label(tick))


def _across(across: Axis, name: str, bottom: float) -> Iterator[Markup]:
    for tick in across.ticks:
        yield _LINE.format(across.at(tick), bottom, across.at(tick), bottom + 4, "grid")
        yield _TEXT.format(across.at(tick), bottom + 16, "end" if tick == across.ticks[-1] else "middle", label(tick))
    yield _TEXT.format((LEFT + RIGHT) / 2, bottom + 30, "middle", name)


def _curve(curve: Curve, across: Axis, up: Axis, ink: str) -> Iterator[Markup]:
    for x, y in curve.raw:
        if math.isfinite(y):
            yield Markup('<circle cx="{}" cy="{}" r="1.2" class="raw {}"/>').format(across.at(x), up.at(y), ink)
    known = [i for i in range(len(curve.low)) if math.isfinite(curve.low[i]) and math.isfinite(curve.high[i])]
    if curve.joined:
        if known:
            edge = [(curve.x[i], curve.high[i]) for i in known] + [(curve.x[i], curve.low[i]) for i in reversed(known)]
            yield Markup('<polygon points="{}" class="band {}"/>').format(_points(edge, across, up), ink)
        there = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        yield Markup('<polyline points="{}" class="curve {}"/>').format(_points(there, across, up), ink)
        return
    for i in known:
        x = across.at(curve.x[i])
        yield _LINE.format(x, up.at(curve.low[i]), x, up.at(curve.high[i]), f"whisker {ink}")
    for x, y in zip(curve.x, curve.y, strict=True):
        yield Markup('<circle cx="{}" cy="{}" r="3" class="mark {}"/>').format(across.at(x), up.at(y), ink)


def _points(points: Sequence[tuple[float, float]], across: Axis, up: Axis) -> str:
    return " ".join(f"{across.at(x)},{up.at(y)}" for x, y in points)


def _legend(names: Sequence[str], top: float) -> Iterator[Markup]:
    """Two names in a row, each behind a piece of its line."""
    for place, name in enumerate(names):
        x, y = LEFT + 205 * (place % 2), top + 16 * (place // 2)
        yield _LINE.format(x, y - 4, x + 22, y - 4, f"curve c{place % COLOURS}")
        yield _TEXT.format(x + 27, y, "start", name)


def _dots(figure: Dots) -> tuple[list[Markup], int]:
    values = [v for _, dots in figure.rows for dot in dots for v in (dot.low, dot.high)]
    kinds = list(dict.fromkeys(dot.kind for _, dots in figure.rows for dot in dots))
    bottom = TOP + _ROW * len(figure.rows)
    across = Axis(ticks=ticks(min(values), max(values)), start=LEFT + 44, end=RIGHT - 8)
    parts = [_LINE.format(across.at(tick), TOP, across.at(tick), bottom, "grid") for tick in across.ticks]
    parts += [_TEXT.format(across.at(tick), bottom + 16, "middle", label(tick)) for tick in across.ticks]
    for row, (name, dots) in enumerate(figure.rows):
        middle = TOP + _ROW * (row + 0.5)
        parts.append(_TEXT.format(across.start - 8, middle + 4, "end", name))
        for dot in dots:
            parts += _dot(
                dot,
                across,
                middle + 10 * (kinds.index(dot.kind) - (len(kinds) - 1) / 2),
                f"c{kinds.index(dot.kind) % COLOURS}",
            )
    return [*parts, *_legend(kinds, bottom + 36)], bottom + 30 + 16 * math.ceil(len(kinds) / 2)


def _dot(dot: Dot, across: Axis, y: float, ink: str) -> Iterator[Markup]:
    yield _LINE.format(across.at(dot.low), y, across.at(dot.high), y, f"whisker {ink}")
    yield Markup('<circle cx="{}" cy="{}" r="4" class="mark {}"/>').format(across.at(dot.value), y, ink)


def _bars(figure: Bars) -> tuple[list[Markup], int]:
    most = max(*(height for _, height in figure.heights), *(level for _, level in figure.levels), 1e-12)
    up = Axis(ticks=ticks(0.0, most, 5), start=_HEIGHT, end=TOP)
    width = (RIGHT - LEFT) / len(figure.heights)
    parts = list(_grid(up))
    for place, (_, height) in enumerate(figure.heights):
        top = up.at(height)
        box = round(LEFT + place * width, 1), top, round(max(0.4, width * 0.85), 1), round(_HEIGHT - top, 1)
        parts.append(Markup('<rect x="{}" y="{}" width="{}" height="{}" class="column c0"/>').format(*box))
    for place, (_, level) in enumerate(figure.levels):
        parts.append(_LINE.format(LEFT, up.at(level), RIGHT, up.at(level), f"curve c{(place + 1) % COLOURS}"))
    names = [name for name, _ in figure.levels]
    for place, name in enumerate(names):
        x = LEFT + 205 * (place % 2)
        parts.append(_LINE.format(x, _HEIGHT + 14, x + 22, _HEIGHT + 14, f"curve c{(place + 1) % COLOURS}"))
        parts.append(_TEXT.format(x + 27, _HEIGHT + 18, "start", name))
    return parts, _HEIGHT + (28 if names else 10)
