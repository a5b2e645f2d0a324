"""A packaged config over several seeds: success of base, cloned and improved, wall time, the gain with its interval.

    python benchmarks/whole_run.py quickstart --seeds 0 1 2 --out runs/bench     runs them, minutes each on 2 cores
    python benchmarks/whole_run.py NAME --collect RUN_DIR ...                    only reads finished run folders

Prints a table and writes ``benchmarks/results/<name>.json`` with machine and date.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def play(config: str, seed: int, out: Path, overrides: list[str]) -> Path:
    """Run ``config`` with ``seed``; its wall time, start-up included, goes beside the summary."""
    run_dir = out / f"seed{seed}"
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pipeline", "run", config, f"seed={seed}", *overrides, "--run-dir", str(run_dir)],
        cwd=ROOT,
        check=True,
    )
    (run_dir / "wall_seconds").write_text(str(time.perf_counter() - started))
    return run_dir


def read(run_dir: Path) -> dict[str, Any]:
    """The numbers of a finished run."""
    summary = json.loads((run_dir / "summary.json").read_text())
    wall = run_dir / "wall_seconds"
    return {
        "run": run_dir.name,
        "stage_seconds": {name: stage["seconds"] for name, stage in summary["stages"].items()},
        "wall_seconds": float(wall.read_text()) if wall.is_file() else None,
        "metrics": {name: stage["metrics"] for name, stage in summary["stages"].items()},
        "evaluation": summary["evaluation"],
    }


def report(rows: list[dict[str, Any]]) -> str:
    """The table, and the gain's mean with the range over seeds."""
    lines = [f"{'run':<12}{'base':>16}{'cloned':>16}{'improved':>16}   gain over cloned, sampled (95 %)   stages, s"]
    for row in rows:
        cells = [
            f"{row['evaluation'][n]['sampled']:.3f}/{row['evaluation'][n]['greedy']:.3f}"
            for n in ("base", "cloned", "improved")
        ]
        gain = row["evaluation"]["differences"]["improved - cloned"]["sampled"]
        seconds = sum(row["stage_seconds"].values())
        lines.append(
            f"{row['run']:<12}"
            + "".join(f"{c:>16}" for c in cells)
            + f"   {gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})   {seconds:.0f}"
        )
    gains = [row["evaluation"]["differences"]["improved - cloned"]["sampled"]["mean"] for row in rows]
    lines.append(
        f"gain: mean {statistics.mean(gains):+.3f}, smallest {min(gains):+.3f}, largest {max(gains):+.3f} "
        "(sampled/greedy above)"
    )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a packaged config's name; the result's, too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmark")
    parser.add_argument("--collect", type=Path, nargs="+", help="finished run folders to read instead of running")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_intermixed_args()
    folders = arguments.collect or [
        play(arguments.config, seed, arguments.out.absolute() / arguments.config, arguments.overrides)
        for seed in arguments.seeds
    ]
    rows = [read(folder) for folder in folders]
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    target = ROOT / "benchmarks" / "results" / f"{arguments.config}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"machine": machine, "runs": rows}, indent=1))
    print(report(rows))


if __name__ == "__main__":
    main()
