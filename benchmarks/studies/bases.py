"""Latent actions on three architectures: base LMs of Llama, GPT-2 and Qwen2 shape, trained alike on countdown, then
countdown.yaml on each.

    python benchmarks/studies/bases.py --out runs/study

The Llama-shaped one is the embedded model; the others are made by the same config (configs/base_countdown.yaml) with
another ``family``. Rows per base: success of the base itself, cross-entropy with codes, code perplexity, what the
cloned policy loses against the base (nats per token), held-out success after reinforcement learning.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from common import ROOT, Curve, cloned, curve, improved, row, run, side_by_side, write

FAMILIES, SEEDS = ("llama", "gpt2", "qwen2"), (0, 1, 2)
UPDATES, LAST = 80, 20


def base_of(out: Path, family: str) -> Path:
    """Where the base LM lies; trained unless it is there."""
    if family == "llama":
        return ROOT / "configs" / "models" / "countdown-1m"
    folder = out / "bases" / family
    made = [f"base.model={folder}", f"base.train.architecture.family={family}"]
    run(out / "bases" / f"{family}-run", made, config="base_countdown")
    return folder


def play(out: Path, family: str, seed: int) -> tuple[Curve, Curve]:
    """(finding and cloning the codes, improving the policy)."""
    own = [] if family == "llama" else [f"base.model={base_of(out, family)}"]
    clone = cloned(out / "bases" / f"{family}-codes", seed, *own)
    learned = improved(
        out / "bases", f"rl-{family}", seed, clone, *own, "improve.epochs=3", f"improve.updates={UPDATES}"
    )
    print(f"{family}, seed {seed}: {statistics.mean(learned.rewards[-LAST:]):.3f}", flush=True)
    return curve(clone.parent.parent), learned


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--base-only", action="store_true", help="train the base LMs and stop")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    side_by_side(lambda family: base_of(out, family), FAMILIES[1:])
    if arguments.base_only:
        return
    jobs = [(family, seed) for family in FAMILIES for seed in arguments.seeds]
    played = dict(zip(jobs, side_by_side(lambda job: play(out, *job), jobs), strict=True))
    rows = []
    for family in FAMILIES:
        found = [played[family, seed] for seed in arguments.seeds]
        evaluations = [after.summary["evaluation"] for _, after in found]
        stages = [before.summary["stages"] for before, _ in found]
        rows += [
            row(f"{family}: base, held out, {m}", [e["base"][m] for e in evaluations]) for m in ("sampled", "greedy")
        ]
        rows += [
            row(f"{family}: {m}", [s["actions"]["metrics"][m] for s in stages])
            for m in ("nll_base", "nll_codes", "inverse_dynamics_code_perplexity")
        ]
        rows.append(
            row(
                f"{family}: lost by cloning",
                [s["clone"]["metrics"]["nll_marginal"] - s["clone"]["metrics"]["nll_base_same"] for s in stages],
            )
        )
        rows += [
            row(f"{family}: after RL, held out, {m}", [e["improved"][m] for e in evaluations])
            for m in ("sampled", "greedy")
        ]
    write("bases", "benchmarks/studies/bases.py", arguments.seeds, rows)


if __name__ == "__main__":
    main()
