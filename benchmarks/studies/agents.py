"""Does an agent improve through SFT, FTA-P and RL, and more than by token-level RL? Success in TextWorld-Express, like
the paper's table.

    python benchmarks/studies/agents.py --seeds 0 1 2 3 4

Each seed is ``configs/agents_textworld.yaml``, base LM included, with its token-level baseline. Intervals are over
seeds, where there are several, else over episodes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import row, run, write

VARIANTS = {
    "base": "SFT",
    "cloned": "SFT, latent",
    "finetuned": "FTA-P",
    "improved": "FTA-P, RL",
    "token_level": "SFT, token-level RL",
}
STEPS = {"FTA-P over SFT": ("finetuned", "base"), "FTA-P over SFT, latent": ("finetuned", "cloned")}
GAINS = {
    "improved - base": "RL over SFT",
    "improved - cloned": "RL over SFT, latent",
    "improved - finetuned": "RL over FTA-P",
    "improved - token_level": "RL over token-level RL",
}


def evaluation(out: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """What the run of a seed came to."""
    folder = out / f"agents-{seed}"
    settings = [f"seed={seed}", f"base.model={folder.resolve()}-base", "improve.token_baseline=true", *overrides]
    run(folder, settings, config="agents_textworld")
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())["evaluation"]
    return found


def fold_row(name: str, measured: list[dict[str, Any]], mode: str) -> dict[str, Any]:
    """Success in one fold: the interval over seeds, or, of one seed, over its episodes."""
    found = row(name, [one[mode] for one in measured])
    return (
        found if len(measured) > 1 else found | dict(zip(("low", "high"), measured[0][f"{mode}_interval"], strict=True))
    )


def gain_row(name: str, gains: list[dict[str, float]]) -> dict[str, Any]:
    """A difference on the same episodes, seen and unseen together: the interval over seeds, or, of one seed, over its
    episodes."""
    found = row(name, [gain["mean"] for gain in gains])
    return found if len(gains) > 1 else found | {"low": gains[0]["low"], "high": gains[0]["high"]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("overrides", nargs="*", help="before the options, e.g. improve.token_learning_rate=5e-4")
    arguments = parser.parse_args()
    found = [evaluation(arguments.out, seed, arguments.overrides) for seed in arguments.seeds]
    rows = []
    for variant, name in VARIANTS.items():
        for fold, said in (("train", "seen"), ("test", "unseen")):
            for mode in ("sampled", "greedy"):
                rows.append(
                    fold_row(f"{name}: {said}, {mode}", [one[variant]["slices"]["fold"][fold] for one in found], mode)
                )
    for name, (after, before) in STEPS.items():
        for mode in ("sampled", "greedy"):
            rows.append(row(f"{name}: {mode}", [one[after][mode] - one[before][mode] for one in found]))
    for pair, name in GAINS.items():
        for mode in ("sampled", "greedy"):
            rows.append(gain_row(f"{name}: {mode}", [one["differences"][pair][mode] for one in found]))
    write("agents", "benchmarks/studies/agents.py", arguments.seeds, rows, evaluations=found)


if __name__ == "__main__":
    main()
