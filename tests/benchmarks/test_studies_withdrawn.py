"""Withdrawn numbers are marked where they stand: in the JSON of their study and in the tables made from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
CODE = """
import sys
from pathlib import Path
from tables import filled
for page in sorted(Path(sys.argv[1]).glob("*.md")):
    text = page.read_text(encoding="utf-8")
    print(page.name, filled(text, page.parent) == text)
"""
WITHDRAWN = {
    "agents": ("RL over token-level RL: sampled", "SFT, token-level RL: seen, sampled"),
    "bases": ("llama: lost by cloning", "qwen2: lost by cloning"),
    "diversity": ("latent - all, solutions to prompts both solved twice",),
    "latent_vs_token": ("final_difference", "rollout_ratio", "wall_ratio, first reached"),
    "number_and_span": ("16 codes, span 1: lost by cloning", "64 codes, span 4: lost by cloning"),
    "transfer": ("sort, retrained: tokens reached per state",),
}


def test_pages_hold_the_tables_of_their_json() -> None:
    studies = ROOT / "benchmarks" / "studies"
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(RESULTS)], cwd=studies, capture_output=True, text=True, check=True
    )
    said = dict(line.split() for line in done.stdout.splitlines())
    assert len(said) > 10 and set(said.values()) == {"True"}, said


def test_withdrawn_numbers_say_so_beside_each_value() -> None:
    for name, rows in WITHDRAWN.items():
        found = {row["name"]: row for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]}
        assert all(found[row]["withdrawn"] for row in rows), name
        page = (RESULTS / f"{name}.md").read_text()
        marked = page.count("withdrawn: ") + page.count("| withdrawn |")
        assert "ithdrawn" in page and marked >= 1, name
        for row in found.values():
            value = f"| {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            assert "withdrawn" not in row or name == "agents" or value not in page, row["name"]
