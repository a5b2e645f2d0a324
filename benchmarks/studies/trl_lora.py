"""SmolLM2 on checkable instructions: seconds until latent RL has the reward that TRL's GRPO with LoRA ends with.

    python -m venv trl && trl/bin/pip install -c requirements.lock torch
    trl/bin/pip install 'trl==1.16.0' 'transformers==5.23.0' peft
    python benchmarks/studies/trl_lora.py --peer-python trl/bin/python --out runs/study [--seeds 0]
        [--dtypes float32 bfloat16]

Same base LM, prompts' kind, verifier, batch (8 prompts x 8 responses of at most 64 tokens), temperature and
threads; one side after the other on an otherwise idle machine; each number type that is named on both sides, and each
side counts with its faster one. TRL takes one optimiser step for a batch, its default
and its fastest; latent RL two passes, as its config says. TRL's budget was named before the first run: ``BUDGET``
batches at LoRA rank 8. Rewards are means of the last ``LAST`` batches; seconds those of sampling,
verifying and updating, without either side's start. ``with_preparation`` adds what learning codes and cloning took,
which one base LM needs once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from baselines import COMMON, LATENT, RATES, started
from common import ROOT, Curve, commits, curve, row, run, write

from latent_control.pretrained import base_path

CONFIG, BUDGET, LAST, RANK, RATE = "instructions", 10, 5, 8, 2e-4
SHAPE = {"prompts": 8, "group": 8, "max_new_tokens": 64, "fixed_length": False, "threads": 2, "parts": 4}
"""TRL computes the gradient of a batch in four parts: whole, its logits took 18 GB and the process was killed."""


def ours(out: Path, seed: int, dtype: str) -> tuple[Path, Curve]:
    """Latent RL from the common clone, as many batches as TRL's."""
    clone = started(out, CONFIG, seed) / "checkpoints" / "clone"
    start = [f"seed={seed}", f"actions.init={clone}", "actions.updates=0", "clone=null", "evaluation=null"]
    start += [f"base.dtype={dtype}", f"improve.mixed_precision={'bf16' if dtype == 'bfloat16' else 'no'}"]
    settings = [*COMMON[CONFIG], f"improve.learning_rate={RATES[CONFIG][LATENT][0]}", f"improve.updates={BUDGET}"]
    folder = run(out / f"beside-trl-{dtype}-{seed}", [*start, *settings], CONFIG)
    return folder, curve(folder)


def theirs(python: str, base: str, seed: int, dtype: str, kept: Path) -> list[dict[str, float]]:
    """Seconds, reward and tokens a response of each of TRL's batches; kept in a file once made."""
    if not kept.is_file():
        settings = SHAPE | {"base": base, "task": CONFIG, "learning_rate": RATE, "lora_rank": RANK}
        settings |= {"dtype": dtype}
        settings |= {"first": 100_000 * (seed + 1)}
        threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [python, str(ROOT / "benchmarks" / "peers" / "trl_grpo.py"), json.dumps(settings)],
            input="1\n" * BUDGET,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | threads | {"PYTHONPATH": str(ROOT)},
        )
        if len(done.stdout.splitlines()) != BUDGET:
            raise RuntimeError(f"TRL ended with exit code {done.returncode}; what it said is above")
        kept.write_text(done.stdout)
    return [json.loads(line) for line in kept.read_text().splitlines()]


def reached(found: Curve, target: float) -> int | None:
    """Batches until the mean of the last ``LAST`` rewards is ``target``."""
    return next((n + LAST for n, reward in enumerate(found.smooth(LAST)) if reward >= target), None)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    asked = parser.parse_args()
    out = asked.out.absolute() / f"baselines-{CONFIG}"
    measured: dict[str, list[float]] = {}
    folders, met = [], 0
    for seed in asked.seeds:
        folder, mine = min((ours(out, seed, one) for one in asked.dtypes), key=lambda run: sum(run[1].seconds))
        folders.append(folder)
        base = base_path(started(out, CONFIG, seed) / "checkpoints" / "clone")
        each = [theirs(asked.peer_python, base, seed, one, out / f"trl-{one}-{seed}.jsonl") for one in asked.dtypes]
        other = min(each, key=lambda batches: sum(batch["seconds"] for batch in batches))
        target = statistics.mean(one["reward"] for one in other[-LAST:])
        batches = reached(mine, target)
        met += batches is not None
        stages = json.loads((started(out, CONFIG, seed) / "summary.json").read_text())["stages"].values()
        preparation = sum(stage["seconds"] for stage in stages)
        wall, whole = sum(mine.seconds[: batches or BUDGET]), sum(one["seconds"] for one in other)
        found = {
            "wall_vs_trl_lora": wall / whole,
            "wall_vs_trl_lora, with preparation": (wall + preparation) / whole,
            "seconds of a batch, ratio": statistics.median(mine.seconds)
            / statistics.median(one["seconds"] for one in other),
            "TRL: seconds of a batch": statistics.median(one["seconds"] for one in other),
            "TRL: reward at the end": target,
            "TRL: reward at the start": other[0]["reward"],
            "latent: seconds of a batch": statistics.median(mine.seconds),
            "latent: reward at the end": statistics.mean(mine.rewards[-LAST:]),
            "latent: reward at the start": mine.rewards[0],
            "preparation_seconds": preparation,
        }
        for name, value in found.items():
            measured.setdefault(name, []).append(value)
    rows: list[Any] = [row(name, values) for name, values in measured.items()]
    budget = {"batches": BUDGET, "last": LAST, "lora_rank": RANK, "learning_rate": RATE}
    about = {"budget": budget, "reached": met, "commits": commits(folders)}
    write("trl_lora", "benchmarks/studies/trl_lora.py", asked.seeds, rows, **about)


if __name__ == "__main__":
    main()
