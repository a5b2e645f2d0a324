"""Puts the tables of ``benchmarks/results/*.json`` between their marks in ``benchmarks/README.md``.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from common import RESULTS, ROOT, table

README = ROOT / "benchmarks" / "README.md"
MARKS = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Path) -> str:
    """``text`` with what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` replaced by the table of
    NAME.json."""
    return MARKS.sub(lambda mark: f"{mark[1]}{section(results / f'{mark[2]}.json')}\n{mark[3]}", text)


def section(path: Path) -> str:
    """A result's table with date, machine and commit; a line saying so where it was not measured."""
    if not path.is_file():
        return "Not measured yet."
    result = json.loads(path.read_text())
    machine = result["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores" + (
        f", {result['device']}" if "device" in result else ""
    )
    return (
        f"{table(result['rows'])}\n\n{machine['date'][:10]}, {where}, torch {machine['packages'].get('torch')}, "
        f"commit {machine['commit']}."
    )


if __name__ == "__main__":
    README.write_text(filled(README.read_text(), RESULTS))
