"""Rollouts until countdown's reward is 0.55: dynamic sampling, more passes with a bound on the KL, and both.

    python benchmarks/studies/half_rollouts.py --out runs/study [--seeds 0 1 2] [--only "3 passes" both]

Every run starts from one and the same cloned policy (that of the first seed); seeds differ in prompts and samples.
Finished runs are kept, so that a study that was interrupted goes on where it was. A run's number is how many rollouts
it had sampled, those of groups that were left out included, when the mean reward of all rollouts of its last ten
updates first reached 0.55; one that never did counts with all its rollouts, and "reached" says how many did. Rows:
that number, its share of that of "3 passes" (paired by seed), and the shares of tied groups sampled and trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from common import cloned, row, run, side_by_side, table, write

from pipeline.runs.layout import METRICS
from pipeline.runs.metrics_log import records

TARGET, WINDOW, UPDATES, SEEDS = 0.55, 10, 120, (0, 1, 2, 3, 4)
DYNAMIC = ["improve.dynamic_sampling=2"]
PASSES = ["improve.epochs=8", "improve.target_kl=0.05"]
FIRST = "3 passes"
VARIANTS: dict[str, list[str]] = {
    FIRST: ["improve.epochs=3"],
    "today": [],
    "dynamic sampling": DYNAMIC,
    "dynamic sampling, 3 passes": [*DYNAMIC, "improve.epochs=3"],
    "more passes": PASSES,
    "both": [*DYNAMIC, *PASSES],
}


def rollouts_to(steps: Sequence[dict[str, Any]], target: float = TARGET, window: int = WINDOW) -> tuple[int, bool]:
    """(rollouts sampled when the mean reward of the last ``window`` updates' rollouts first reached ``target``, whether
    it did; all rollouts where it did not)."""
    for end in range(window, len(steps) + 1):
        last = steps[end - window : end]
        total = sum(step["rollouts"] for step in last)
        if sum(step["reward"] * step["rollouts"] for step in last) >= target * total:
            return int(sum(step["rollouts"] for step in steps[:end])), True
    return int(sum(step["rollouts"] for step in steps)), False


def played(out: Path, clone: Path, name: str, seed: int, updates: int) -> dict[str, Any]:
    """The numbers of one run."""
    start = [f"seed={seed}", f"actions.init={clone}", "actions.updates=0", "clone=null", "evaluation=null"]
    folder = out / "half_rollouts" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    run(folder, [*start, f"improve.updates={updates}", *VARIANTS[name]])
    steps = [step for step in records(folder / METRICS) if step["stage"] == "improve"]
    rollouts, reached = rollouts_to(steps)
    found = {
        "rollouts": rollouts,
        "reached": reached,
        "seconds": sum(s["seconds_sampling"] + s["seconds_updating"] + s["seconds_publishing"] for s in steps),
        "tied sampled": mean(s.get("tied_groups_sampled", s["tied_groups"]) for s in steps),
        "tied trained on": mean(s["tied_groups"] for s in steps),
        "steps an update": mean(s["steps_taken"] for s in steps),
        "reward, last 20": mean(s["reward"] for s in steps[-20:]),
    }
    print(f"{name}, seed {seed}: {json.dumps(found)}", flush=True)
    return found


def rows_of(results: dict[tuple[str, int], dict[str, Any]], names: Sequence[str], seeds: Sequence[int]) -> list[Any]:
    """Rows with intervals over seeds."""
    rows = []
    for name in names:
        found = [results[name, seed] for seed in seeds]
        for measure in found[0]:
            rows.append(row(f"{name}: {measure}", [float(one[measure]) for one in found]))
        if FIRST in names and name != FIRST:
            shares = [one["rollouts"] / results[FIRST, s]["rollouts"] for one, s in zip(found, seeds, strict=True)]
            rows.append(row(f"{name}: share of the rollouts of {FIRST}", shares))
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--publish", action="store_true", help="write docs/results/half_rollouts.json")
    asked = parser.parse_args()
    out = asked.out.absolute()
    clone = cloned(out, SEEDS[0])
    jobs = [(name, seed) for seed in asked.seeds for name in asked.only]
    found = side_by_side(lambda job: played(out, clone, *job, asked.updates), jobs, asked.at_once)
    rows = rows_of(dict(zip(jobs, found, strict=True)), asked.only, asked.seeds)
    if asked.publish:
        write("half_rollouts", "benchmarks/studies/half_rollouts.py", asked.seeds, rows)
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
