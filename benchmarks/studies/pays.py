"""What reinforcement learning over codes gains when decoding greedily, which is what is served.

    python benchmarks/studies/pays.py RUN ...        finished runs of configs/quickstart.yaml, one for each seed

Differences of success on the held-out prompts, each seed's own two models against each other.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import row, write

from configs.loading import load_config
from pipeline.runs.events import read_events
from pipeline.runs.layout import CONFIG, SUMMARY

PAIRS = (
    ("greedy_gain_quickstart", "improved - cloned", "greedy"),
    ("greedy_gain_quickstart_over_base", "improved - base", "greedy"),
    ("greedy_by_token_gain_quickstart", "improved - cloned", "greedy_token"),
    ("greedy_by_token_gain_quickstart_over_base", "improved - base", "greedy_token"),
    ("sampled_gain_quickstart", "improved - cloned", "sampled"),
    ("sampled_gain_quickstart_over_base", "improved - base", "sampled"),
    ("cloning_alone_quickstart", "cloned - base", "greedy"),
)
"""Row, difference, way of decoding; the base LM has one greedy way, by token."""


def difference(evaluation: dict[str, Any], pair: str, measure: str) -> float:
    """Of a run's two models, in success on its held-out prompts."""
    ours, other = (evaluation[name] for name in pair.split(" - "))
    return float(ours[measure] - other.get(measure, other["greedy"]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    folders = parser.parse_args().runs
    evaluations = [json.loads((folder / SUMMARY).read_text())["evaluation"] for folder in folders]
    seeds = [load_config(folder / CONFIG, check_paths=False).seed for folder in folders]
    rows = [row(name, [difference(e, pair, measure) for e in evaluations]) for name, pair, measure in PAIRS]
    commits = sorted({e["git_commit"] for folder in folders for e in read_events(folder) if "git_commit" in e})
    write("pays", "benchmarks/studies/pays.py", seeds, rows, commits=commits)


if __name__ == "__main__":
    main()
