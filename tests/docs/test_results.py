"""The numbers that pages show are those of the files that scripts wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_study_says_where_it_comes_from(file: Path) -> None:
    study = json.loads(file.read_text())
    assert study["study"] == file.stem and (ROOT / study["script"]).is_file() and study["seeds"]
    names = [row["name"] for row in study["rows"]]
    assert len(set(names)) == len(names) > 0
    for row in study["rows"]:
        alone = row["low"] != row["low"]  # one seed: no interval
        assert alone or row["low"] <= row["value"] <= row["high"], row
        assert (row["n"] == 1) <= alone, row


def test_the_first_screen_shows_the_run_that_the_benchmark_recorded() -> None:
    """Success with its intervals and the gains of seed 0 of ``benchmarks/results/quickstart.json``."""
    screen = (ROOT / "README.md").read_text().split("<!-- test command -->")[0]
    found = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text())["runs"][0]["evaluation"]
    for variant in ("base", "cloned", "improved"):
        shown = re.search(rf"^{variant} +([\d.]+) +\S+ - \S+ +([\d.]+) ", screen, re.MULTILINE)
        assert shown, variant
        assert shown.groups() == (f"{found[variant]['sampled']:.3f}", f"{found[variant]['greedy']:.3f}")
    gains = re.findall(r"^(\w+ - \w+) +([+-][\d.]+) +\S+ to \S+ +([+-][\d.]+) ", screen, re.MULTILINE)
    assert len(gains) == 3
    for pair, sampled, greedy in gains:
        means = found["differences"][pair]
        assert (sampled, greedy) == (f"{means['sampled']['mean']:+.3f}", f"{means['greedy']['mean']:+.3f}")


def test_what_the_first_page_says_beside_baselines_is_what_the_study_found() -> None:
    study = json.loads((ROOT / "docs" / "results" / "baselines_quickstart.json").read_text())
    found = {row["name"]: f"{row['value']:.3f}" for row in study["rows"]}
    said = re.search(r"\(greedy ([\d.]+) against ([\d.]+), .*?; LoRA r8 ([\d.]+)\)", (ROOT / "README.md").read_text())
    assert said and study["best_token"] == "last_blocks"
    assert said.groups() == tuple(found[f"{side}: greedy"] for side in ("latent", "last_blocks", "lora_r8"))


def test_what_the_first_page_says_of_greedy_gains_is_what_the_seeds_gave() -> None:
    rows = {row["name"]: row for row in json.loads((ROOT / "docs" / "results" / "pays.json").read_text())["rows"]}
    said = re.findall(r"by (0\.\d+) \((0\.\d+) - (0\.\d+)\) over", (ROOT / "README.md").read_text())
    for name, shown in zip(("greedy_gain_quickstart", "greedy_gain_quickstart_over_base"), said, strict=True):
        assert shown == tuple(f"{rows[name][key]:.3f}" for key in ("value", "low", "high"))
        assert rows[name]["n"] == 5
