"""The rows of ``benchmarks/search.py`` (search against best-of-n at equal tokens) as a study.

    python benchmarks/search.py --runs ... --q ... && python benchmarks/studies/search.py

Each row is the paired difference of success, the search minus best-of-n with as many generated tokens for each prompt;
its interval is bootstrapped over prompts (two runs, 64 each).
"""

from __future__ import annotations

import json
import re
from typing import Any

from common import ROOT, write

NUMBER = re.compile(r"[-+][0-9.]+")


def row_of(found: dict[str, Any]) -> dict[str, Any]:
    """One case as a row."""
    mean, low, high = map(float, NUMBER.findall(found["search - best-of-n"]))
    kept = [found[key] for key in ("policy", "value", "method", "iterations", "temperature")]
    name = "{}, value {}, {}, {} iterations, temperature {:g}".format(*kept)
    return {"name": name, "value": mean, "low": low, "high": high, "n": found["n"]}


def main() -> None:
    """Command line."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "search.json").read_text(encoding="utf-8"))
    write(
        "search",
        "benchmarks/search.py",
        [0, 1],
        [row_of(found) for found in measured["rows"]],
        machine=measured["machine"],
    )


if __name__ == "__main__":
    main()
