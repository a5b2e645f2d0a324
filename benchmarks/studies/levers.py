"""What each setting of reinforcement learning is worth on countdown.yaml: algorithms, passes, temperature, aliases,
placement, fine-tuning.

    python benchmarks/studies/levers.py --out runs/study

Every variant starts from the same codes and cloned policy of its seed (those named "codes:" find their own) and gets as
many rollouts. Rows: mean reward of all updates (how fast it learns), of the last 20 (how far it gets), seconds per
update, and the difference to the first variant, paired by seed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from common import Curve, cloned, improved, row, side_by_side, write

UPDATES, LAST, SEEDS = 80, 20, (100, 101, 102)
THREE = ["improve.epochs=3"]
VARIANTS: dict[str, list[str]] = {
    "3 passes": THREE,
    "1 pass": [],
    "temperature 0.6": [*THREE, "rollout.temperature=0.6"],
    "aliases 8": [*THREE, "improve.equivalent_codes=8"],
    "aliases 64": [*THREE, "improve.equivalent_codes=64"],
    "aliases 8, learning rate 1e-3": [*THREE, "improve.equivalent_codes=8", "improve.learning_rate=1e-3"],
    "dr_grpo": [*THREE, "improve.algorithm=dr_grpo"],
    "rloo": [*THREE, "improve.algorithm=rloo"],
    "remax": [*THREE, "improve.algorithm=remax"],
    "reinforce_pp": [*THREE, "improve.algorithm=reinforce_pp"],
    "ppo": [*THREE, "improve.algorithm=ppo"],
    "ppo, lambda 0.95": [*THREE, "improve.algorithm=ppo", "improve.gae_lambda=0.95"],
    "KL 0.02": [*THREE, "improve.kl_coefficient=0.02"],
    "clip to 1.4": [*THREE, "improve.clip_high=0.4"],
}
CODES: dict[str, list[str]] = {
    "codes: temperature fitted": ["clone.fit_temperature=[1.0,0.7,0.5,0.35]"],
    "codes: policy reads final": ["actions.policy_reads=final"],
    "codes: all read final": ["actions.policy_reads=final", "actions.inverse_dynamics_reads=final"],
    "codes: 1 layer": ["actions.policy_layers=1", "actions.inverse_dynamics_layers=1"],
    "codes: cloned three times as long": ["clone.updates=1500"],
    "codes: hard labels": ["clone.targets=hard"],
}


def play(out: Path, name: str, seed: int) -> Curve:
    """One variant with one seed."""
    plain = name.removeprefix("codes: ").replace(" ", "-").replace(",", "")
    settings = CODES.get(name, VARIANTS.get(name, []))
    own = name in CODES
    clone = cloned(out / f"codes-{plain}", seed, *settings) if own else cloned(out, seed)
    actions = [setting for setting in settings if setting.startswith("actions.")]
    overrides = [*actions, *THREE] if own else settings
    found = improved(out / "levers", plain, seed, clone, *overrides, f"improve.updates={UPDATES}", "evaluation=null")
    print(
        f"{name}, seed {seed}: {statistics.mean(found.rewards):.3f} {statistics.mean(found.rewards[-LAST:]):.3f}",
        flush=True,
    )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, *CODES], default=[*VARIANTS, *CODES])
    arguments = parser.parse_args()
    out, names = arguments.out.absolute(), arguments.only
    side_by_side(lambda seed: cloned(out, seed), arguments.seeds)
    jobs = [(name, seed) for name in names for seed in arguments.seeds]
    curves = dict(zip(jobs, side_by_side(lambda job: play(out, *job), jobs), strict=True))
    rows = []
    for name in names:
        found, first = ([curves[n, seed] for seed in arguments.seeds] for n in (name, names[0]))
        ends = [[statistics.mean(curve.rewards[-LAST:]) for curve in some] for some in (found, first)]
        means = [[statistics.mean(curve.rewards) for curve in some] for some in (found, first)]
        rows += [row(f"{name}: reward, all updates", means[0]), row(f"{name}: reward, last {LAST}", ends[0])]
        rows.append(row(f"{name}: seconds per update", [statistics.mean(curve.seconds) for curve in found]))
        if name != names[0]:
            rows.append(row(f"{name}: all updates, difference", [a - b for a, b in zip(*means, strict=True)]))
            rows.append(row(f"{name}: last {LAST}, difference", [a - b for a, b in zip(*ends, strict=True)]))
    write("levers", "benchmarks/studies/levers.py", arguments.seeds, rows)


if __name__ == "__main__":
    main()
