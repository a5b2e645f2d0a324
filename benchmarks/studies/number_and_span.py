"""How many codes, and how long should each last? Quickstart with N and span varied, several seeds.

    python benchmarks/studies/number_and_span.py --out runs/study

Rows per setting: cross-entropy with codes, code perplexity, what the cloned policy loses against the base LM (nats per
token), reward at the end of reinforcement learning, held-out success, and decisions per rollout.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from common import Curve, cloned, curve, improved, row, side_by_side, write

# Every number with a span of 1, and the default number with every span.
GRID = ((16, 1), (32, 1), (64, 1), (128, 1), (64, 2), (64, 4))
UPDATES, LAST, SEEDS = 80, 20, (0, 1, 2)


def settings(number: int, span: int) -> list[str]:
    """What a setting changes of countdown.yaml."""
    return [f"actions.num_actions={number}", f"actions.span={span}"]


def play(out: Path, number: int, span: int, seed: int) -> tuple[Curve, Curve]:
    """(finding and cloning the codes, improving the policy)."""
    folder = out / f"codes-{number}-{span}"
    clone = cloned(folder, seed, *settings(number, span))
    # The codebook comes with the checkpoint; its shape must be the section's.
    rl = [*settings(number, span), "improve.epochs=3", f"improve.updates={UPDATES}", "evaluation.marginal_sequences=0"]
    learned = improved(folder, "improve", seed, clone, *rl)
    print(f"{number} codes, span {span}, seed {seed}: {statistics.mean(learned.rewards[-LAST:]):.3f}", flush=True)
    return curve(clone.parent.parent), learned


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    jobs = [(number, span, seed) for number, span in GRID for seed in arguments.seeds]
    played = dict(zip(jobs, side_by_side(lambda job: play(arguments.out.absolute(), *job), jobs), strict=True))
    rows = []
    for number, span in GRID:
        found = [played[number, span, seed] for seed in arguments.seeds]
        stages = [before.summary["stages"] for before, _ in found]
        name = f"{number} codes, span {span}"
        rows += [
            row(f"{name}: {m}", [s["actions"]["metrics"][m] for s in stages])
            for m in ("nll_codes", "inverse_dynamics_code_perplexity")
        ]
        lost = [s["clone"]["metrics"]["nll_marginal"] - s["clone"]["metrics"]["nll_base_same"] for s in stages]
        rows.append(row(f"{name}: lost by cloning", lost))
        rows.append(row(f"{name}: reward at the end", [statistics.mean(after.rewards[-LAST:]) for _, after in found]))
        rows += [
            row(f"{name}: held out, {m}", [after.summary["evaluation"]["improved"][m] for _, after in found])
            for m in ("sampled", "greedy")
        ]
    write("number_and_span", "benchmarks/studies/number_and_span.py", arguments.seeds, rows)


if __name__ == "__main__":
    main()
