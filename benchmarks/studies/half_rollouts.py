"""Rollouts until countdown's reward is 0.55: dynamic sampling, more passes with a bound on the KL, smaller groups, and
codes that are one event where they emit one token.

    python benchmarks/studies/half_rollouts.py --out runs/study [--seeds 0 1 2] [--only "3 passes" both] [--publish]

Every run starts from one and the same cloned policy (that of the first seed); seeds differ in prompts and samples.
Finished runs are kept, so that a study that was interrupted goes on where it was. A run's number is how many rollouts
it had sampled, those of groups that were left out included, when the mean reward of all rollouts of its last ten
updates first reached 0.55; one that never did counts with all its rollouts, and "reached" says how many did. Where
updates are small, ten of them are a shorter and noisier mean: the same number by the last 1,280 rollouts stands beside
it. Rows: both numbers, their shares of those of "3 passes" (paired by seed), and the shares of tied groups.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Any

from common import cloned, row, run, side_by_side, table, write

from pipeline.runs.layout import METRICS
from pipeline.runs.metrics_log import records

TARGET, WINDOW, UPDATES, SEEDS = 0.55, 10, 120, (0, 1, 2, 3, 4)
SMOOTH = 1280
"""Rollouts of ten updates of today's size."""
SMOOTHED = "rollouts by the last 1,280"
DYNAMIC = ["improve.dynamic_sampling=2"]
PASSES = ["improve.epochs=8", "improve.target_kl=0.05"]
SMALL = ["improve.epochs=3", "improve.group_size=4"]
EVENTS = ["improve.equivalent_codes=64"]
FIRST = "3 passes"
VARIANTS: dict[str, list[str]] = {
    FIRST: ["improve.epochs=3"],
    "today": [],
    "dynamic sampling": DYNAMIC,
    "dynamic sampling, 3 passes": [*DYNAMIC, "improve.epochs=3"],
    "more passes": PASSES,
    "both": [*DYNAMIC, *PASSES],
    "small groups": SMALL,
    "equivalent codes": ["improve.epochs=3", *EVENTS],
    "small groups, equivalent codes": [*SMALL, *EVENTS],
}


def rollouts_to(
    steps: Sequence[dict[str, Any]], target: float = TARGET, updates: int = WINDOW, rollouts: int = 0
) -> tuple[int, bool]:
    """(rollouts sampled when the mean reward of the rollouts of the last ``updates`` updates, or of as many as hold
    ``rollouts``, first reached ``target``, whether it did; all rollouts where it did not)."""

    def enough(last: Sequence[dict[str, Any]]) -> bool:
        return len(last) >= updates and sum(step["rollouts"] for step in last) >= rollouts

    for end in range(1, len(steps) + 1):
        begin = next((begin for begin in range(end - 1, -1, -1) if enough(steps[begin:end])), None)
        last = steps[:0] if begin is None else steps[begin:end]
        total = sum(step["rollouts"] for step in last)
        if last and sum(step["reward"] * step["rollouts"] for step in last) >= target * total:
            return int(sum(step["rollouts"] for step in steps[:end])), True
    return int(sum(step["rollouts"] for step in steps)), False


def played(out: Path, clone: Path, name: str, seed: int, updates: int) -> dict[str, Any]:
    """The numbers of one run."""
    start = [f"seed={seed}", f"actions.init={clone}", "actions.updates=0", "clone=null", "evaluation=null"]
    folder = out / "half_rollouts" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    run(folder, [*start, f"improve.updates={updates}", *VARIANTS[name]])
    steps = [step for step in records(folder / METRICS) if step["stage"] == "improve"]
    rollouts, reached = rollouts_to(steps)
    took = [s["seconds_sampling"] + s["seconds_updating"] + s["seconds_publishing"] for s in steps]
    until = list(accumulate(s["rollouts"] for s in steps)).index(rollouts) + 1
    found = {
        "rollouts": rollouts,
        "seconds until then": sum(took[:until]),
        SMOOTHED: rollouts_to(steps, updates=1, rollouts=SMOOTH)[0],
        "reached": reached,
        "seconds": sum(took),
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
            for measure in ("rollouts", SMOOTHED, "seconds until then"):
                shares = [one[measure] / results[FIRST, s][measure] for one, s in zip(found, seeds, strict=True)]
                rows.append(row(f"{name}: share of the {measure} of {FIRST}", shares))
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
