"""Does an agent program with a tool improve by reinforcement learning through the gateway? SmolLM2 and a calculator.

    python benchmarks/studies/calculator.py --seeds 0

Each seed is ``configs/calculator.yaml``. Rows: success on held-out questions of the base LM, of the cloned policy and
after RL, sampled at temperature 1 and greedy, all played by the same program. Intervals are over seeds; those over the
episodes of each seed are in ``evaluations``.
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


def rows_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of each variant and mode, and of the gains of RL."""
    rows = []
    for mode, shown in MODES.items():
        for variant, name in VARIANTS.items():
            if mode in found[0][variant]:
                rows.append(row(f"{name}: {shown}", [one[variant][mode] for one in found]))
        gains = [one["differences"]["improved - cloned"][mode]["mean"] for one in found]
        rows.append(row(f"RL over the cloned policy: {shown}", gains))
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
    write("calculator", "benchmarks/studies/calculator.py", arguments.seeds, rows_of(found), evaluations=found,
          runs_of=commits(runs), rewards=[one.rewards for one in curves], seconds=seconds)  # fmt: skip


if __name__ == "__main__":
    main()
