"""A comparison as sections: for the terminal, for the page beside run B, and for ``watch``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.modes import MODES
from pipeline.experiments.compare import COSTS
from pipeline.pages.page import report_page
from pipeline.pages.records import Cell, ReportPage, ReportSection, Table

SEEDS = "Methods are runs that differ in their seed only"
REACH = (
    "Cost to reach: until the last 10 updates have that mean reward, which every method reaches; means over seeds. All "
    "stages behind the model; base pretraining excluded."
)
SHOWN = 160
"""Letters of a prompt's end."""


def sections(result: Mapping[str, Any]) -> list[ReportSection]:
    """What ``compare`` or ``side_by_side`` found."""
    lines = [result["verdict"], *_sides(result)] if "verdict" in result else [*map(_sentence, _sampled(result))]
    tables = [*success(result), cost(result), *config(result)]
    found = ReportSection(
        name="comparison",
        title="Comparison",
        warnings=result.get("notes", ()),
        lines=lines,
        figures=result["figures"],
        tables=tables,
    )
    more = [one for one in (_flipped(result["flipped"]), _matched(result["matched"])) if one.rows]
    return [found, *([ReportSection(name="answers", title="Answers and codes", tables=more)] if more else [])]


def terminal_tables(result: Mapping[str, Any]) -> list[Table]:
    """Success, cost and config; what is drawn is left out."""
    return [*success(result), cost(result), *config(result)]


def _sampled(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [d for d in result["differences"] if d["mode"] == "sampled"]


def _sentence(d: Mapping[str, Any]) -> str:
    better = f"{d['name'][0 if d['low'] > 0 else 4]} is better: " if d["low"] > 0 or d["high"] < 0 else ""
    seeds = "; other seeds may differ" if "prompts" in d["unit"] else ""
    return (
        f"{better or 'No significant difference: '}{d['name']} is {d['value']:+.3f} (95 % interval {d['low']:+.3f} to "
        f"{d['high']:+.3f}), sampled success, over {d['unit']}{seeds}."
    )


def _sides(result: Mapping[str, Any]) -> list[str]:
    return [f"{n}: {', '.join(result[n.lower()])} ({v})" for n, v in zip("AB", result["variants"], strict=True)]


def success(result: Mapping[str, Any]) -> list[Table]:
    """Forest plots with their numbers: success of each method, and differences on the same prompts."""
    rates = [(method["name"], rate) for method in result["methods"] for rate in method["success"]]
    apart = [(d["name"], d) for d in result["differences"]]
    tables = (
        ("Success of each method on its own held-out prompts", rates, "{:.3f}", ()),
        ("Differences on the same held-out prompts", apart, "{:+.3f}", (0.0,)),
    )
    return [_forest(title, rows, form.format, zero) for title, rows, form, zero in tables if rows]


def _forest(
    title: str, rows: Sequence[tuple[str, Mapping[str, Any]]], shown: Callable[[float], str], zero: Sequence[float]
) -> Table:
    low, high = min(*zero, *(r["low"] for _, r in rows), 9.0), max(*zero, *(r["high"] for _, r in rows), -9.0)
    cells: list[list[Cell]] = [
        [
            f"{name}, {MODES[r['mode']]}",
            shown(r["value"]),
            f"{shown(r['low'])} to {shown(r['high'])}",
            {"value": r["value"], "low": r["low"], "high": r["high"], "from": low, "to": high},
            r["unit"],
        ]
        for name, r in rows
    ]
    return Table(title=title, head=("", "mean", "95 % interval", "on one scale", "over"), rows=cells)


def cost(result: Mapping[str, Any]) -> Table:
    """A row for each method; of two sides, their ratio."""
    level = result["level"]
    reach = ("rollouts", "seconds") if level is not None else ()
    head = [
        "",
        *(name.replace("_", " ") for name in COSTS),
        *(f"{name} to reward {level:.2f}" for name in reach),
        "runs",
    ]
    rows = [
        [
            method["name"],
            *(number(method["costs"][name]) for name in COSTS),
            *(number(method["reached"][name]) for name in reach),
            ", ".join(f"{run['name']} (seed {run['seed']})" for run in method["runs"]),
        ]
        for method in result["methods"]
    ]
    if "costs" in result:
        ratios = result["costs"]["a_over_b"]
        rows.append(["A / B", *(number(ratios[name]) for name in COSTS), *["" for _ in reach], ""])
    return Table(title="Cost", head=head, rows=rows, note=REACH)


def config(result: Mapping[str, Any]) -> list[Table]:
    """Keys that differ, by meaning: files and folders by content; of single runs all keys."""
    names = [method["name"] for method in result["methods"]]
    rows = [[row["key"], *row["values"]] for row in result["config"]]
    title, note = "Config", "Files and folders by content. " + SEEDS + "."
    return [Table(title=title, head=("key", *names), rows=rows, note=note)] if rows else []


def _flipped(flipped: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[list[Cell]] = [
        [
            f["prompt"][-SHOWN:],
            f["better"].upper(),
            {"text": f["a"], "beside": f["b"]},
            {"text": f["b"], "beside": f["a"]},
        ]
        for f in flipped
    ]
    title = f"Held-out prompts that A or B alone solves, greedy ({len(rows)})"
    return Table(title=title, head=("prompt", "solved by", "A", "B"), rows=rows)


def _matched(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(rows[0]) if rows else []
    head = [f"{name} {what}" for name in names for what in ("code", "top tokens", "usage", "gain", "overlap")]
    kept = [place for place, text in enumerate(head) if text != f"{names[0]} overlap"]

    def cells(found: Mapping[str, Any]) -> list[str]:
        gain = "-" if found["gain"] is None else f"{found['gain']:+.4f}"
        overlap = f"{100 * found.get('overlap', 1.0):.0f} %"
        return [
            str(found["code"]),
            " ".join(map(repr, found["tokens"])),
            f"{100 * found['usage']:.1f} %",
            gain,
            overlap,
        ]

    body = [[text for name in names for text in cells(row[name])] for row in rows]
    note = "Each code of A with the one of the other run whose tokens in rollouts overlap most; usage and gain of each."
    picked = [[row[place] for place in kept] for row in body]
    return Table(title="Matched codes", head=[head[place] for place in kept], rows=picked, note=note)


def number(value: float | None) -> str:
    """A cost."""
    return "not known" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def write_page(result: Mapping[str, Any], path: Path) -> Path:
    """The comparison of two sides as a page."""
    title = f"{Path(result['a'][0]).name} against {Path(result['b'][0]).name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report_page(ReportPage(title=title, sections=sections(result))), encoding="utf-8")
    return path
