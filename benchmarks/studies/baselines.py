"""Latent actions beside every token-level baseline that a reader asks for, from one and the same start.

    python benchmarks/studies/baselines.py quickstart --sweep --out runs/study        # every setting, one seed
    python benchmarks/studies/baselines.py quickstart --out runs/study                # the best of each, other seeds

All sides share trainer, engine, prompts, rewards, batches, temperature and evaluation; the token level starts from the
base LM itself, the latent side from the policy cloned on the base LM's own kind of text. Rows, by side: success on
held-out prompts sampled and greedy, the mean reward of the last ten updates, seconds of an update, parameters trained.
``rollouts_vs_best_token`` and ``wall_vs_best_token``: what latent RL spends
until the mean reward of its last ten updates is what the best baseline ends with, over the baseline's whole budget; a
seed that never gets there counts with its whole budget, and ``reached`` says how many did. That baseline may have been
there before its end, too: ``rollouts_of_best_token_itself``. Times are of RL alone;
``preparation_seconds`` is what codes and clone took.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Curve, commits, curve, row, run, side_by_side, write

from pipeline.runs.layout import SUMMARY

DEV, LAST, PLAYED = 100, 10, 512
MODES = {"sampled": "heldout_success", "greedy": "heldout_greedy"}
"""Ways of playing held-out prompts after the last update; greedy is by code on the latent side."""
LATENT = "latent"
TOKEN = "improve.level=token"
SIDES: dict[str, list[str]] = {
    LATENT: [],
    "last_blocks": [TOKEN, "improve.token_trains=last_blocks"],
    "lora_r1": [TOKEN, "improve.token_trains=lora", "improve.token_rank=1"],
    "lora_r8": [TOKEN, "improve.token_trains=lora", "improve.token_rank=8"],
    "lora_r32": [TOKEN, "improve.token_trains=lora", "improve.token_rank=32"],
    "steering": [TOKEN, "improve.token_trains=steering"],
    "mlp": [TOKEN, "improve.token_trains=mlp"],
    "all": [TOKEN, "improve.token_trains=all"],
}
"""Overrides of each side."""
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "quickstart": {
        LATENT: (5e-4, 1e-3),
        "last_blocks": (2e-4, 5e-4),
        "lora_r1": (3e-3, 1e-2),
        "lora_r8": (1e-3, 3e-3),
        "lora_r32": (5e-4, 1e-3),
        "steering": (3e-2, 1e-1),
        "mlp": (3e-4, 1e-3),
        "all": (2e-4, 5e-4),
    },
    "instructions": {
        LATENT: (3e-4, 1e-3),
        "last_blocks": (3e-5, 1e-4),
        "lora_r8": (2e-4, 1e-3),
        "steering": (1e-3, 3e-3),
    },
}
"""Of each side's sweep, by config; the larger model takes lower ones."""
ONE_START = {"instructions"}
"""Configs of which all seeds share one codebook and clone."""
COMMON = {
    "quickstart": ["improve.epochs=3"],
    "instructions": [
        "rollout.num_workers=2",
        "cluster.learner_threads=2",
        "improve.token_blocks=4",
        "improve.evaluate_prompts=256",
    ],
}
"""Overrides of all sides."""


def started(out: Path, config: str, seed: int) -> Path:
    """The run with codes and cloned policy of ``config``, which all sides share; on the large model all seeds, too."""
    seed = 0 if config in ONE_START else seed
    return run(out / f"start-{seed}", [f"seed={seed}", "improve=null", "evaluation.marginal_sequences=0"], config)


def played(out: Path, config: str, side: str, seed: int, rate: float, *more: str) -> Curve:
    """RL of one side from the common start."""
    clone = started(out, config, seed) / "checkpoints" / "clone"
    start = [f"seed={seed}", f"actions.init={clone}", "actions.updates=0", "clone=null"]
    plays = ["improve.evaluate_every=1000000", f"improve.evaluate_prompts={PLAYED}", "evaluation=null"]
    settings = [*plays, *COMMON[config], *SIDES[side], f"improve.learning_rate={rate}", *more]
    return curve(run(folder_of(out, side, rate, seed), [*start, *settings], config))


def folder_of(out: Path, side: str, rate: float, seed: int) -> Path:
    """The run of a side."""
    return out / f"{side}-{rate:g}-{seed}"


def last(found: Curve) -> float:
    """Mean reward at the end of the budget."""
    return statistics.mean(found.rewards[-LAST:])


def sweep(out: Path, config: str, sides: Sequence[str], at_once: int, updates: int | None) -> list[dict[str, Any]]:
    """Every rate of every side, with a seed that the comparison does not use."""
    started(out, config, DEV)
    shorter = ["improve.evaluate_every=null", *([f"improve.updates={updates}"] if updates else [])]
    jobs = [(side, rate) for side in sides for rate in RATES[config][side]]

    def play(job: tuple[str, float]) -> dict[str, Any]:
        found = played(out, config, job[0], DEV, job[1], *shorter)
        print(f"{job[0]} {job[1]:g}: {last(found):.3f}", flush=True)
        return {"side": job[0], "rate": job[1], "reward": last(found)}

    return side_by_side(play, jobs, at_once)


def best_rates(tried: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> dict[str, float]:
    """Each side's rate with the highest reward at the end."""
    return {
        side: max((t for t in tried if t["side"] == side), key=lambda t: float(t["reward"]))["rate"] for side in sides
    }


def spent(found: Curve, target: float) -> int | None:
    """Updates until the mean of the last ``LAST`` rewards is ``target``."""
    return next((n + LAST for n, reward in enumerate(found.smooth(LAST)) if reward >= target), None)


def against(ours: Sequence[Curve], theirs: Sequence[Curve]) -> tuple[list[dict[str, Any]], int]:
    """Rows of what latent RL spends over the best baseline's budget, and how many seeds got there at all."""
    rollouts, walls, itself, reached = [], [], [], 0
    for mine, other in zip(ours, theirs, strict=True):
        updates = spent(mine, last(other))
        reached += updates is not None
        updates = updates or len(mine.rewards)
        rollouts.append(updates / len(other.rewards))
        itself.append((spent(other, last(other)) or len(other.rewards)) / len(other.rewards))
        walls.append(sum(mine.seconds[:updates]) / sum(other.seconds))
    rows = [row("rollouts_vs_best_token", rollouts), row("wall_vs_best_token", walls)]
    return [*rows, row("rollouts_of_best_token_itself", itself)], reached


def compare(
    out: Path, config: str, rates: Mapping[str, float], seeds: Sequence[int], at_once: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the study and what they come from."""
    side_by_side(lambda seed: started(out, config, seed), seeds, at_once)
    jobs = [(side, seed) for seed in seeds for side in rates]
    found = dict(
        zip(jobs, side_by_side(lambda job: played(out, config, *job, rates[job[0]]), jobs, at_once), strict=True)
    )
    by_side = {side: [found[side, seed] for seed in seeds] for side in rates}
    rows = []
    for side, curves in by_side.items():
        rows += [row(f"{side}: {mode}", [c.heldout[key] for c in curves]) for mode, key in MODES.items()]
        rows.append(row(f"{side}: reward at the end", [last(c) for c in curves]))
        rows.append(row(f"{side}: seconds of an update", [statistics.mean(c.seconds) for c in curves]))
        trained = [float(c.summary["stages"]["improve"]["metrics"]["parameters_trained"]) for c in curves]
        rows.append(row(f"{side}: parameters trained", trained))
    before = [json.loads((started(out, config, seed) / SUMMARY).read_text()) for seed in seeds]
    for variant, mode in (("base", "sampled"), ("base", "greedy"), ("cloned", "sampled"), ("cloned", "greedy")):
        rows.append(row(f"{variant}: {mode}", [b["evaluation"][variant][mode] for b in before]))
    preparation = [sum(stage["seconds"] for stage in b["stages"].values()) for b in before]
    rows.append(row("preparation_seconds", preparation))
    for mode, key in MODES.items():
        for variant in ("base", "cloned"):
            gains = [
                c.heldout[key] - b["evaluation"][variant][mode] for c, b in zip(by_side[LATENT], before, strict=True)
            ]
            rows.append(row(f"{LATENT} - {variant}: {mode}", gains))
    folders = [folder_of(out, side, rates[side], seed) for side, seed in jobs]
    more = {"rates": dict(rates), "commits": commits([*folders, *(started(out, config, seed) for seed in seeds)])}
    others = [side for side in rates if side != LATENT]
    if not others:
        return rows, more
    token = max(others, key=lambda side: statistics.mean(map(last, by_side[side])))
    pairs = list(zip(by_side[LATENT], by_side[token], strict=True))
    for mode, key in MODES.items():
        rows.append(row(f"{LATENT} - best token: {mode}", [a.heldout[key] - b.heldout[key] for a, b in pairs]))
    ratios, reached = against(by_side[LATENT], by_side[token])
    return rows + ratios, more | {"best_token": token, "reached": reached}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", choices=list(RATES))
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), help="default: all that have rates for the config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sweep-updates", type=int, help="fewer updates than the config's")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    asked = parser.parse_args()
    out = asked.out.absolute() / f"baselines-{asked.config}"
    file, sides = out / "sweep.json", asked.sides or list(RATES[asked.config])
    if asked.sweep:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(sweep(out, asked.config, sides, asked.at_once, asked.sweep_updates), indent=1))
        return
    tried = json.loads(file.read_text())
    rows, more = compare(out, asked.config, best_rates(tried, sides), asked.seeds, asked.at_once)
    write(f"baselines_{asked.config}", "benchmarks/studies/baselines.py", asked.seeds, rows, sweep=tried, **more)


if __name__ == "__main__":
    main()
