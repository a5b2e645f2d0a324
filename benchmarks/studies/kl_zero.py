"""Three times the usual updates without any KL term: does success on held-out prompts fall?

    python benchmarks/studies/kl_zero.py --out runs/study

The held-out curve is measured every 50 updates; ``last_minus_best`` is success at the end minus the best before it,
``last_minus_usual`` minus success after the usual number of updates. The best two token-level settings run beside when
the sweep of latent_vs_token.py is there, all sides at one temperature.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import cloned, improved, row, side_by_side, write
from latent_vs_token import SIDES, TEMPERATURE, best_of, name_of, overrides

from pipeline.runs.layout import METRICS
from pipeline.runs.metrics_log import series

USUAL, TIMES, EVERY, PROMPTS, SEEDS = 150, 3, 50, 256, (0, 1, 2)
PLAYED = ("latent", "last_blocks", "all")


def play(out: Path, side: str, seed: int, settings: list[str]) -> list[float]:
    """Held-out success, sampled, every ``EVERY`` updates."""
    long = [
        f"improve.updates={USUAL * TIMES}",
        f"improve.evaluate_every={EVERY}",
        f"improve.evaluate_prompts={PROMPTS}",
        "evaluation=null",
    ]
    name = name_of(f"kl-zero-{side}", TEMPERATURE)
    improved(out, name, seed, cloned(out, seed), *settings, "improve.kl_coefficient=0", *long)
    found = series(out / f"{name}-{seed}" / METRICS, "improve", "heldout_success")
    print(f"{side}, seed {seed}: {' '.join(f'{value:.3f}' for value in found)}", flush=True)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    sweep = out / "sweep.json"
    best: dict[str, Any] = best_of(json.loads(sweep.read_text())["tried"], str(TEMPERATURE)) if sweep.is_file() else {}
    chosen = {
        side: overrides(*(best[side][k] for k in ("side", "rate", "epochs", "temperature")))
        for side in PLAYED
        if side in best
    }
    chosen = chosen or {"latent": [*SIDES["latent"][0], f"rollout.temperature={TEMPERATURE}"]}
    jobs = [(side, seed) for side in chosen for seed in arguments.seeds]
    side_by_side(lambda seed: cloned(out, seed), arguments.seeds)
    curves = dict(zip(jobs, side_by_side(lambda job: play(out, *job, chosen[job[0]]), jobs), strict=True))
    usual, rows = USUAL // EVERY - 1, []
    for side in chosen:
        found = [curves[side, seed] for seed in arguments.seeds]
        rows += [row(f"{side}: after {EVERY * (i + 1)} updates", [c[i] for c in found]) for i in range(len(found[0]))]
        rows.append(row(f"{side}: last_minus_usual", [c[-1] - c[usual] for c in found]))
        rows.append(row(f"{side}: last_minus_best", [c[-1] - max(c) for c in found]))
    write("kl_zero", "benchmarks/studies/kl_zero.py", arguments.seeds, rows)


if __name__ == "__main__":
    main()
