"""HTML pages and line charts as SVG inside them: one file each, nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ddd;padding:.2em .8em;text-align:left}
pre{white-space:pre-wrap;background:#f5f5f5;padding:.6em}
.flag{border-left:4px solid #c33;padding-left:1em}figure{display:inline-block;margin:1em}"""
FRAME = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>{{ style }}</style></head>
<body><h1>{{ title }}</h1>{% for line in lines %}<p>{{ line }}</p>{% endfor %}
{% for table in tables %}<h2>{{ table.title }}</h2><table><tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endfor %}
{% for chart in charts %}{{ chart }}{% endfor %}
{% for flag in flags %}<div class="flag"><h2>{{ flag.title }}</h2>{% for r in flag.rollouts %}<p><b>{{ r.rollout_id }}</b></p>
<pre>{{ r.prompt_text }}</pre><pre>{{ r.text }}</pre>{% endfor %}</div>{% endfor %}</body></html>"""
CHART = """<figure><figcaption>{{ title }}</figcaption><svg viewBox="0 0 460 260" width="460" height="260" role="img" font-size="11">
<rect x="45" y="10" width="400" height="200" fill="none" stroke="#ccc"/>
<text x="40" y="16" text-anchor="end">{{ top }}</text><text x="40" y="212" text-anchor="end">{{ bottom }}</text>
<text x="45" y="226">{{ left }}</text><text x="445" y="226" text-anchor="end">{{ right }}</text>
<text x="245" y="226" text-anchor="middle">{{ across }}</text>
{% for line in lines %}<polyline fill="none" stroke="{{ line.colour }}" stroke-width="1.5" points="{{ line.points }}"/>
<text x="{{ 50 + 130 * loop.index0 }}" y="248" fill="{{ line.colour }}">{{ line.name }}</text>{% endfor %}</svg></figure>"""
COLOURS = ("#1b6ca8", "#c4622d", "#3a8f4d", "#8a4f9e", "#777777", "#b3a125")
Points = Sequence[tuple[float, float]]


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(template).render(**values)


def page(
    title: str,
    *,
    lines: Sequence[str] = (),
    tables: Sequence[Mapping[str, Any]] = (),
    charts: Sequence[str] = (),
    flags: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A whole page. ``tables``: ``{"title", "head", "rows"}``; ``charts``: from ``chart``; every text is escaped."""
    from markupsafe import Markup

    shown = [Markup(chart) for chart in charts]  # made here, escaped when they were
    return _render(FRAME, title=title, style=Markup(STYLE), lines=lines, tables=tables, charts=shown, flags=flags)


def chart(title: str, across: str, curves: Mapping[str, Points]) -> str:
    """Curves of (x, y) points over common axes; curves without points are left out, empty text when all are."""
    kept = {name: points for name, points in curves.items() if points}
    if not kept:
        return ""
    xs, ys = zip(*(point for points in kept.values() for point in points), strict=True)
    left, right, bottom, top = min(xs), max(xs), min(ys), max(ys)
    lines = [
        {"name": name, "colour": COLOURS[i % len(COLOURS)], "points": _path(points, (left, right or 1), (bottom, top))}
        for i, (name, points) in enumerate(kept.items())
    ]
    return _render(
        CHART, title=title, across=across, lines=lines, left=f"{left:.4g}", right=f"{right:.4g}", bottom=f"{bottom:.3g}", top=f"{top:.3g}"
    )


def _path(points: Points, across: tuple[float, float], up: tuple[float, float]) -> str:
    width, height = (across[1] - across[0]) or 1.0, (up[1] - up[0]) or 1.0
    return " ".join(f"{45 + 400 * (x - across[0]) / width:.1f},{210 - 200 * (y - up[0]) / height:.1f}" for x, y in points)
