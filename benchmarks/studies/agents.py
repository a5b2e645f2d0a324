"""Does an agent improve through SFT, FTA-P and RL, and more than by token-level RL? Success in TextWorld-Express, like
the paper's table.

    python benchmarks/studies/agents.py --seeds 0 1 2 3 4

Each seed is ``configs/agents_textworld.yaml``: a base LM, codes and a cloned policy once, then both sides at each
sampling temperature. The sides differ in nothing else: one base LM; FTA-P and the token level's own SFT take as many
updates on the same games; RL takes as many updates of as many games at one learning rate; sampled success is at the
temperature of training, greedy success by token on both sides. ``best temperature``: each side's own best of them, by
the mean over the seeds, chosen on the games it is reported on, for both alike. Intervals are over seeds, where there
are several, else over episodes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import row, run, side_by_side, write

VARIANTS = {
    "base": "SFT",
    "cloned": "SFT, latent",
    "finetuned": "FTA-P",
    "improved": "FTA-P, RL",
    "token_sft": "SFT as long as FTA-P",
    "token_level": "SFT as long, token-level RL",
}
GAINS = {
    "finetuned - base": "FTA-P over SFT",
    "finetuned - cloned": "FTA-P over SFT, latent",
    "token_sft - base": "SFT as long over SFT",
    "finetuned - token_sft": "FTA-P over SFT as long",
    "improved - finetuned": "RL over FTA-P",
    "token_level - token_sft": "token-level RL over SFT as long",
    "improved - token_level": "RL over token-level RL",
}
MODES = {"sampled": "sampled", "greedy_token": "greedy by token"}
Evaluation = dict[str, Any]


def start_of(out: Path, seed: int, overrides: Sequence[str]) -> Path:
    """The run that trains the base LM, the codes and the cloned policy of a seed."""
    made = [f"seed={seed}", f"base.model={out / f'agents-{seed}-base'}", *overrides]
    return run(
        out / f"agents-{seed}", [*made, "finetune=null", "improve=null", "evaluation=null"], config="agents_textworld"
    )


def evaluation(out: Path, seed: int, temperature: float, overrides: Sequence[str]) -> Evaluation:
    """What both sides came to at one temperature."""
    codes = out / f"agents-{seed}" / "checkpoints" / "clone"
    start = [f"seed={seed}", f"base.model={out / f'agents-{seed}-base'}", "base.train=null"]
    start += [f"actions.init={codes}", "actions.updates=0", "clone.updates=0"]
    sides = ["improve.token_baseline=true", f"rollout.temperature={temperature}", *overrides]
    folder = run(out / f"agents-{seed}-{temperature:g}", [*start, *sides], config="agents_textworld")
    found: Evaluation = json.loads((folder / "summary.json").read_text())["evaluation"]
    return found


def of(found: Mapping[str, Any], mode: str) -> Any:
    """A number of ``mode``; greedy by token is the one greedy of a model without codes."""
    return found.get(mode, found[mode.replace("_token", "")])


def fold_row(name: str, measured: list[Evaluation], mode: str) -> dict[str, Any]:
    """Success in one fold: the interval over seeds, or, of one seed, over its episodes."""
    found = row(name, [of(one, mode) for one in measured])
    interval = of(measured[0], f"{mode}_interval")
    return found if len(measured) > 1 else found | dict(zip(("low", "high"), interval, strict=True))


def gain_row(name: str, gains: list[Mapping[str, float]]) -> dict[str, Any]:
    """A difference on the same episodes, seen and unseen together: the interval over seeds, or, of one seed, over its
    episodes."""
    found = row(name, [gain["mean"] for gain in gains])
    return found if len(gains) > 1 else found | {"low": gains[0]["low"], "high": gains[0]["high"]}


def rows_at(temperature: float, found: list[Evaluation]) -> list[dict[str, Any]]:
    """What is reported of one temperature."""
    rows, at = [], f"temperature {temperature:g}"
    for variant, name in VARIANTS.items():
        for fold, said in (("train", "seen"), ("test", "unseen")):
            of_fold = [one[variant]["slices"]["fold"][fold] for one in found]
            rows += [fold_row(f"{at}, {name}: {said}, {shown}", of_fold, mode) for mode, shown in MODES.items()]
    for pair, name in GAINS.items():
        gains = [one["differences"][pair] for one in found]
        rows += [gain_row(f"{at}, {name}: {m}", [of(gain, mode) for gain in gains]) for mode, m in MODES.items()]
    return rows


def best_rows(found: Mapping[float, list[Evaluation]]) -> list[dict[str, Any]]:
    """Each side at its best temperature, by the mean over all episodes."""
    rows = []
    for mode, shown in MODES.items():
        ends = {}
        for side in ("improved", "token_level"):
            means = {t: statistics.mean(of(one[side], mode) for one in some) for t, some in found.items()}
            best = max(means, key=lambda t: means[t])
            ends[side] = [of(one[side], mode) for one in found[best]]
            rows.append(row(f"best temperature, {VARIANTS[side]} ({best:g}): {shown}", ends[side]))
        differences = [a - b for a, b in zip(ends["improved"], ends["token_level"], strict=True)]
        rows.append(row(f"best temperature, RL over token-level RL: {shown}", differences))
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0, 1.3])
    parser.add_argument("overrides", nargs="*", help="before the options, e.g. improve.token_learning_rate=5e-4")
    arguments = parser.parse_args()
    out, seeds, overrides = arguments.out.absolute(), arguments.seeds, arguments.overrides
    side_by_side(lambda seed: start_of(out, seed, overrides), seeds)
    jobs = [(seed, temperature) for temperature in arguments.temperatures for seed in seeds]
    made = dict(zip(jobs, side_by_side(lambda job: evaluation(out, *job, overrides), jobs), strict=True))
    found = {t: [made[seed, t] for seed in seeds] for t in arguments.temperatures}
    rows = [row for temperature, some in found.items() for row in rows_at(temperature, some)] + best_rows(found)
    write("agents", "benchmarks/studies/agents.py", arguments.seeds, rows, evaluations=found)


if __name__ == "__main__":
    main()
