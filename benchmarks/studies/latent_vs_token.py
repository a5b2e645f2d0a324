"""Latent actions against the best token-level baseline on countdown.yaml: same trainer, prompts, rewards, batches,
evaluation.

    python benchmarks/studies/latent_vs_token.py --sweep --out runs/study    # all settings of each side, one seed
    python benchmarks/studies/latent_vs_token.py --out runs/study            # the best of each, five other seeds

All sides sample at one temperature, in training and in the evaluation (``--temperature``; ``own``: each at the one that
its sweep chose, which compares sampled success at different temperatures). Greedy by token is the same decoding on all
sides; ``greedy`` of the latent side is by code.

The target is what the best token-level baseline earns at the end of its budget (mean of its last 20 updates); a side
reaches it when the mean of its last 10 updates does. ``rollout_ratio`` and ``wall_ratio``: what latent RL spends to
reach it over the baseline's budget; ``..., first reached``: over what the baseline itself spends until it is there for
the first time. A seed that never reaches it counts with its whole budget, which is too little;
``target_missed_by_latent`` says how many do. Times are of reinforcement learning alone. ``latent, half the updates`` is
the bar put directly: half the baseline's rollouts, with a learning rate that falls to the end, and what is still
missing then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from common import Curve, cloned, improved, row, side_by_side, write

UPDATES, DEV, SEEDS = 150, 100, (0, 1, 2, 3, 4)
SIDES = {
    "latent": (["improve.level=latent"], (5e-4, 1e-3)),
    "last_blocks": (["improve.level=token", "improve.token_trains=last_blocks"], (2e-4, 5e-4, 1e-3)),
    "added_blocks": (["improve.level=token", "improve.token_trains=added_blocks"], (2e-4, 5e-4, 1e-3)),
    "all": (["improve.level=token", "improve.token_trains=all"], (1e-4, 2e-4, 5e-4)),
}
EPOCHS, TEMPERATURES = (1, 3), (1.0, 0.6)
TEMPERATURE = 0.6
"""Of all sides in the comparisons: the best one of every side in the sweep (the latent side had 0.650 at both)."""
LAST, WINDOW, FORMAT = 20, 10, 0.98
MODES = {"sampled": "sampled", "greedy": "greedy", "greedy_token": "greedy by token"}
# Chosen on seeds 100 and 101, like the settings of the sweep.
HALF = [
    "improve.learning_rate=7e-4",
    "improve.min_learning_rate_share=0.05",
    "improve.epochs=3",
]
HALF += [f"improve.updates={UPDATES // 2}"]
# for diversity.py
EVALUATION = ["evaluation.marginal_sequences=0", "evaluation.prompts=256", "evaluation.samples_per_prompt=8"]


def overrides(side: str, rate: float, epochs: int, temperature: float) -> list[str]:
    """What a setting changes of countdown.yaml."""
    return [
        *SIDES[side][0],
        f"improve.learning_rate={rate}",
        f"improve.epochs={epochs}",
        f"rollout.temperature={temperature}",
    ]


def last(curve: Curve) -> float:
    """Reward at the end of the budget."""
    return statistics.mean(curve.rewards[-LAST:])


def best_of(tried: list[dict[str, Any]], temperature: str) -> dict[str, dict[str, Any]]:
    """Each side's setting with the highest reward at the end, at one temperature for all or at each its own."""
    there = [t for t in tried if temperature == "own" or t["temperature"] == float(temperature)]
    if not there:
        known = ", ".join(str(t) for t in sorted({t["temperature"] for t in tried}))
        raise ValueError(f"--temperature {temperature} was not swept; the sweep has {known}")
    return {side: max((t for t in there if t["side"] == side), key=lambda t: t["reward"]) for side in SIDES}


def name_of(side: str, temperature: float) -> str:
    """Of a side's runs."""
    return f"{side}-at-{temperature:g}"


def sweep(out: Path, updates: int) -> list[dict[str, Any]]:
    """Every setting of every side with one seed that the comparison does not use."""
    clone = cloned(out, DEV)
    jobs = [
        (side, rate, epochs, temperature)
        for side, (_, rates) in SIDES.items()
        for rate, epochs, temperature in itertools.product(rates, EPOCHS, TEMPERATURES)
    ]

    def play(job: tuple[str, float, int, float]) -> float:
        side, rate, epochs, temperature = job
        name = f"sweep-{side}-{rate:g}-{epochs}-{temperature:g}"
        reward = last(
            improved(out, name, DEV, clone, *overrides(*job), f"improve.updates={updates}", "evaluation=null")
        )
        print(f"{name}: {reward:.3f}", flush=True)
        return reward

    rewards = side_by_side(play, jobs)
    return [
        {"side": s, "rate": r, "epochs": e, "temperature": t, "reward": reward}
        for (s, r, e, t), reward in zip(jobs, rewards, strict=True)
    ]


def reached(curve: Curve, target: float) -> int | None:
    """Updates after which the smoothed reward is at ``target``."""
    return next((i + WINDOW for i, reward in enumerate(curve.smooth(WINDOW)) if reward >= target), None)


def compare(out: Path, best: dict[str, Any], seeds: tuple[int, ...]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the study and the curves they come from."""

    def play(job: tuple[str, int]) -> Curve:
        side, seed = job
        chosen = best[side]
        settings = overrides(side, chosen["rate"], chosen["epochs"], chosen["temperature"])
        name, more = name_of(side, chosen["temperature"]), [f"improve.updates={UPDATES}", *EVALUATION]
        found = improved(out, name, seed, cloned(out, seed), *settings, *more)
        print(f"{side}, seed {seed}: {last(found):.3f}", flush=True)
        return found

    side_by_side(lambda seed: cloned(out, seed), seeds)
    jobs = [(side, seed) for side in SIDES for seed in seeds]
    curves = dict(zip(jobs, side_by_side(play, jobs), strict=True))
    token = max(
        (side for side in SIDES if side != "latent"),
        key=lambda side: statistics.mean(last(curves[side, seed]) for seed in seeds),
    )
    rows = [row(f"{side}: reward at the end", [last(curves[side, seed]) for seed in seeds]) for side in SIDES]
    rows += [
        row(f"{side}: held out, {shown}", [heldout(curves[side, seed], side, mode) for seed in seeds])
        for side in SIDES
        for mode, shown in MODES.items()
    ]
    for side in SIDES:
        found = [curves[side, seed] for seed in seeds]
        rows.append(row(f"{side}: seconds sampling per update", [statistics.mean(c.sampling) for c in found]))
        rows.append(row(f"{side}: seconds updating per update", [statistics.mean(c.updating) for c in found]))
        rows.append(
            row(
                f"{side}: updates until {FORMAT:.0%} of the rollouts are valid",
                [float(learned_format(c)) for c in found],
            )
        )
    spent, missed = ratios([curves["latent", seed] for seed in seeds], [curves[token, seed] for seed in seeds])
    rows.append(row("final_difference", [last(curves["latent", seed]) - last(curves[token, seed]) for seed in seeds]))
    rows += [row(name, values) for name, values in spent.items()]
    rows += at_half(out, [(seed, curves[token, seed]) for seed in seeds], token, best[token]["temperature"])
    more = {"token_baseline": token, "target_missed_by_latent": missed, "settings": best}
    return rows, more | {
        "rewards": {f"{side}-{seed}": [round(r, 4) for r in c.rewards] for (side, seed), c in curves.items()}
    }


def at_half(out: Path, baselines: list[tuple[int, Curve]], token: str, temperature: float) -> list[dict[str, Any]]:
    """Rows of latent RL with half the updates against the whole budget of the best baseline, (seed, curve) each."""
    seeds = [seed for seed, _ in baselines]
    settings = [*HALF, f"rollout.temperature={temperature}", *EVALUATION]
    folder = name_of("latent-half", temperature)
    found = side_by_side(lambda seed: improved(out, folder, seed, cloned(out, seed), *settings), seeds)
    pairs, name = list(zip(found, (curve for _, curve in baselines), strict=True)), "latent, half the updates"
    differences = [
        row(
            f"{name}: held out, {shown}, minus {token}'s",
            [heldout(a, "latent", mode) - heldout(b, token, mode) for a, b in pairs],
        )
        for mode, shown in MODES.items()
    ]
    return [
        row(f"{name}: reward at the end", [last(curve) for curve in found]),
        row(f"{name}: reward minus {token}'s", [last(a) - last(b) for a, b in pairs]),
        *differences,
        row(f"{name}: seconds over {token}'s", [sum(a.seconds) / sum(b.seconds) for a, b in pairs]),
    ]


def ratios(latent: list[Curve], token: list[Curve]) -> tuple[dict[str, list[float]], int]:
    """(what latent RL spends to reach the baseline's reward over what the baseline spends, seeds that do not reach
    it)."""
    names = [f"{what}{kind}" for kind in ("", ", first reached") for what in ("rollout_ratio", "wall_ratio")]
    found: dict[str, list[float]] = {name: [] for name in names}
    missed = 0
    for ours, theirs in zip(latent, token, strict=True):
        target = last(theirs)
        mine, first = reached(ours, target), reached(theirs, target) or len(theirs.rewards)
        missed += mine is None
        spent = mine or len(ours.rewards)
        for yours, kind in ((len(theirs.rewards), ""), (first, ", first reached")):
            found[f"rollout_ratio{kind}"].append(spent / yours)
            found[f"wall_ratio{kind}"].append(sum(ours.seconds[:spent]) / sum(theirs.seconds[:yours]))
    return found, missed


def learned_format(curve: Curve) -> int:
    """Updates until ``FORMAT`` of the rollouts are valid, on the mean of ``WINDOW`` updates; all of them when that
    never comes."""
    means = [statistics.mean(curve.format[i - WINDOW : i]) for i in range(WINDOW, len(curve.format) + 1)]
    return next((i + WINDOW for i, share in enumerate(means) if share >= FORMAT), len(curve.format))


def heldout(curve: Curve, side: str, mode: str) -> float:
    """Success of the trained policy on held-out prompts; greedy by token is the one greedy of a model without codes."""
    found = curve.summary["evaluation"]["improved" if side == "latent" else "token_level"]
    return float(found[mode] if side == "latent" else found[mode.removesuffix("_token")])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--sweep-updates", type=int, default=100)
    parser.add_argument(
        "--temperature", default=str(TEMPERATURE), help="of all sides, one that was swept; own: each its best"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    file = out / "sweep.json"
    if arguments.sweep:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"tried": sweep(out, arguments.sweep_updates)}, indent=1))
        print(file.read_text())
        return
    tried = json.loads(file.read_text())["tried"]
    rows, more = compare(out, best_of(tried, arguments.temperature), tuple(arguments.seeds))
    write("latent_vs_token", "benchmarks/studies/latent_vs_token.py", arguments.seeds, rows, sweep=tried, **more)


if __name__ == "__main__":
    main()
