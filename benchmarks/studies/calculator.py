"""Does an agent program with a tool improve by reinforcement learning through the gateway? SmolLM2 and a calculator.

    python benchmarks/studies/calculator.py --seeds 0

Each seed is ``configs/calculator.yaml``. Rows: success on held-out questions of the base LM, of the cloned policy and
after RL, sampled at temperature 1 and greedy, all played by the same program. Intervals are over seeds, where there
are several, else over episodes (Wilson); those of gains over the same episodes (bootstrap).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, commits, curve, row, run, write

VARIANTS = {"base": "base LM", "cloned": "cloned policy", "improved": "after RL"}
MODES = {"sampled": "sampled", "greedy": "greedy", "greedy_token": "greedy by token"}
TEXTS = ROOT / "configs" / "calculator-samples.jsonl"


def success(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of each variant and mode."""
    rows = []
    for variant, name in VARIANTS.items():
        for mode, shown in MODES.items():
            if mode in found[0][variant]:
                made = row(f"{name}: {shown}", [one[variant][mode] for one in found])
                low, high = found[0][variant][f"{mode}_interval"]
                rows.append(made if len(found) > 1 else made | {"low": low, "high": high})
    return rows


def gains(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the gains of RL."""
    rows = []
    for mode, shown in MODES.items():
        every = [one["differences"]["improved - cloned"][mode] for one in found]
        made = row(f"RL over the cloned policy: {shown}", [one["mean"] for one in every])
        rows.append(made if len(found) > 1 else made | {"low": every[0]["low"], "high": every[0]["high"]})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("overrides", nargs="*", help="before the options, e.g. improve.updates=40")
    arguments = parser.parse_args()
    program = [sys.executable, str(ROOT / "configs" / "programs" / "calculator.py"), "texts", "300"]
    TEXTS.write_text(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    out = arguments.out.absolute()
    runs = [run(out / f"calculator-{seed}", [f"seed={seed}", *arguments.overrides], config="calculator")
            for seed in arguments.seeds]  # fmt: skip
    curves = [curve(folder) for folder in runs]
    found = [one.summary["evaluation"] for one in curves]
    seconds = [{"sampling": sum(one.sampling), "updating": sum(one.updating)} for one in curves]
    write("calculator", "benchmarks/studies/calculator.py", arguments.seeds, [*success(found), *gains(found)],
          runs_of=commits(runs), rewards=[one.rewards for one in curves], seconds=seconds)  # fmt: skip


if __name__ == "__main__":
    main()
