"""What reinforcement learning over codes gains when decoding greedily, which is what is served, and what it costs
beside the alternatives.

    python benchmarks/studies/pays.py RUN ...        finished runs of configs/quickstart.yaml, one for each seed
    python benchmarks/studies/pays.py                only takes the other studies' rows again

Differences of success on the held-out prompts, each seed's own two models against each other. The other rows are taken
from the studies that made them, as far as those have been run (``OTHERS``).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import RESULTS, commits, row, write

from configs.loading import load_config
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
OTHERS = (
    ("greedy_gain_smollm2", "baselines_instructions", "latent - cloned: greedy"),
    ("greedy_gain_smollm2_over_base", "baselines_instructions", "latent - base: greedy"),
    ("wall_vs_best_token", "baselines_quickstart", "wall_vs_best_token"),
    ("rollouts_vs_best_token", "baselines_quickstart", "rollouts_vs_best_token"),
    ("greedy_vs_best_token", "baselines_quickstart", "latent - best token: greedy"),
    ("wall_vs_trl_lora", "trl_lora", "wall_vs_trl_lora"),
    ("rollouts_to_055", "half_rollouts", "small groups, equivalent codes: share of the rollouts of 3 passes"),
)
"""Row, study, its row."""


def difference(evaluation: dict[str, Any], pair: str, measure: str) -> float:
    """Of a run's two models, in success on its held-out prompts."""
    ours, other = (evaluation[name] for name in pair.split(" - "))
    return float(ours[measure] - other.get(measure, other["greedy"]))


def of_others() -> list[dict[str, Any]]:
    """Rows of ``OTHERS`` whose studies have a result, with their study, commit and seeds."""
    found = []
    for name, study, wanted in OTHERS:
        if (file := RESULTS / f"{study}.json").is_file():
            made = json.loads(file.read_text(encoding="utf-8"))
            about = {key: made.get(key) for key in ("study", "script", "commit", "seeds")}
            found += [taken | about | {"name": name} for taken in made["rows"] if taken["name"] == wanted]
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    folders = parser.parse_args().runs
    if not folders:
        known = json.loads((RESULTS / "pays.json").read_text(encoding="utf-8"))
        own = [found for found in known["rows"] if "study" not in found]
        write("pays", known["script"], known["seeds"], own + of_others(), commits=known["commits"])
        return
    evaluations = [json.loads((folder / SUMMARY).read_text())["evaluation"] for folder in folders]
    seeds = [load_config(folder / CONFIG, check_paths=False).seed for folder in folders]
    rows = [row(name, [difference(e, pair, measure) for e in evaluations]) for name, pair, measure in PAIRS]
    write("pays", "benchmarks/studies/pays.py", seeds, rows + of_others(), commits=commits(folders))


if __name__ == "__main__":
    main()
