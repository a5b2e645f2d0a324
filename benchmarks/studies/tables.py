"""Puts the rows of ``docs/results/NAME.json`` as tables between their marks in the pages beside them.

    python benchmarks/studies/tables.py

``<!-- rows NAME -->`` takes all rows of the study; ``<!-- rows NAME: REGEX -->`` those whose name the expression finds.
Rows named "case: measure" become one table, the longer of the two downwards; all others a line each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent.parent / "docs" / "results"
MARKS = re.compile(r"(<!-- rows (\w+)(?:: (.*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Path) -> str:
    """``text`` with what stands between the marks replaced by the rows' tables."""

    def section(mark: re.Match[str]) -> str:
        study = json.loads((results / f"{mark[2]}.json").read_text(encoding="utf-8"))
        return f"{mark[1]}{tables([row for row in study['rows'] if re.search(mark[3] or '', row['name'])])}\n{mark[4]}"

    return MARKS.sub(section, text)


def cell(row: dict[str, Any]) -> str:
    """``0.667 (0.608 to 0.726)``; the value alone where a single seed leaves no interval; a row whose JSON says why it
    is ``withdrawn`` begins with that word."""
    between = "" if row["low"] != row["low"] else f" ({number(row['low'])} to {number(row['high'])})"
    return ("withdrawn: " if "withdrawn" in row else "") + number(row["value"]) + between


def number(value: float) -> str:
    """Three decimals below ten, one above."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: cases by measures where the names allow, then the rest."""
    split = [(*row["name"].rpartition(": "), row) for row in rows]
    names = [case for case, _, _, _ in split if case]
    measures = [measure for case, _, measure, _ in split if case]
    pivoted = {(case, measure): cell(row) for case, _, measure, row in split if case}
    down, across = list(dict.fromkeys(names)), list(dict.fromkeys(measures))
    if len(across) > len(down):
        down, across, pivoted = across, down, {(measure, case): text for (case, measure), text in pivoted.items()}
    parts = []
    if down:
        lines = [f"| | {' | '.join(across)} |", "|---" * (len(across) + 1) + "|"]
        lines += [f"| {line} | {' | '.join(pivoted.get((line, column), '') for column in across)} |" for line in down]
        parts.append("\n".join(lines))
    rest = [(measure, row) for case, _, measure, row in split if not case]
    if rest:
        parts.append(
            "\n".join(
                [
                    "| | mean (95 % interval) | n |",
                    "|---|---|---|",
                    *(f"| {m} | {cell(r)} | {r['n']} |" for m, r in rest),
                ]
            )
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    for page in RESULTS.glob("*.md"):
        page.write_text(filled(page.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
