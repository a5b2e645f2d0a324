"""Are latent policies more varied than token-level ones, at equal success? Reads the runs that latent_vs_token.py left.

    python benchmarks/studies/diversity.py --out runs/study

Eight sampled responses to each held-out prompt, all sides at one temperature. Success rises and diversity falls as a
policy sharpens, so each seed's two policies are compared on the prompts that *both* solved at least twice, by the share
of pairs of *solutions* that differ.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from common import row, write
from latent_vs_token import SIDES, TEMPERATURE, name_of

from pipeline.evaluation.diversity import per_prompt_pairs, solutions
from pipeline.evaluation.outcome_file import read_outcomes
from pipeline.runs.layout import OUTCOMES


def played(folder: Path, variant: str) -> tuple[float, np.ndarray, np.ndarray]:
    """(success, share of differing pairs of all responses [P], of the successful ones [P], NaN with fewer than two)."""
    found: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for outcome in read_outcomes(folder / OUTCOMES):
        if outcome.variant == variant and outcome.mode == "sampled":
            found[outcome.prompt_id].append((outcome.response, outcome.success))
    prompts = [found[key] for key in sorted(found)]
    responses = [[text for text, _ in prompt] for prompt in prompts]
    successes = [[good for _, good in prompt] for prompt in prompts]
    good = solutions(responses, successes)
    return float(np.mean(successes)), per_prompt_pairs(responses), per_prompt_pairs(good)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="of all sides' runs")
    arguments = parser.parse_args()
    sides = {
        side: [
            played(
                arguments.out / f"{name_of(side, arguments.temperature)}-{seed}",
                "improved" if side == "latent" else "token_level",
            )
            for seed in arguments.seeds
        ]
        for side in SIDES
    }
    rows = []
    for side, runs in sides.items():
        rows.append(row(f"{side}: success", [success for success, _, _ in runs]))
        rows.append(row(f"{side}: differing pairs", [float(np.nanmean(pairs)) for _, pairs, _ in runs]))
        if side != "latent":
            pairs = list(zip(sides["latent"], runs, strict=True))
            rows.append(
                row(
                    f"latent - {side}, solutions to prompts both solved twice",
                    [at_equal_success(a[2], b[2]) for a, b in pairs],
                )
            )
    write("diversity", "benchmarks/studies/diversity.py", arguments.seeds, rows)


def at_equal_success(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean difference [P] over the prompts where both have a value."""
    both = ~np.isnan(ours) & ~np.isnan(theirs)
    return float(np.mean(ours[both] - theirs[both]))


if __name__ == "__main__":
    main()
