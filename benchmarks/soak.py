"""Memory of driver and rollout workers over a long run: growth from update 100 on, and its slope. Bar: under 5 % from
update 100 to 1,000.

    python benchmarks/soak.py --minutes 60 [--quick]

A run of countdown.yaml's shape (its base LM and codes, one update after the other) is started, ended by SIGTERM
after that time, and judged by its own metrics ``driver_gib`` and ``worker_gib``: resident memory after each update.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, arguments, report, table

from pipeline.runs.layout import METRICS
from pipeline.runs.metrics_log import records

SHORT = ("actions.updates=60", "clone.updates=60", "evaluation=null", "explorer.enabled=false", "tracking.enabled=true")
WINDOW = 50
"""Updates around a point over which its memory is the median."""


def around(values: list[float], update: int) -> float:
    """Median of the ``WINDOW`` values from ``update`` on."""
    return statistics.median(values[update - 1 : update - 1 + WINDOW])


def rows(metrics: list[dict[str, Any]], first: int, last: int) -> list[dict[str, Any]]:
    """A row for driver and workers."""
    found = []
    for who, key in (("driver and learner", "driver_gib"), ("largest rollout worker", "worker_gib")):
        values = [record[key] for record in metrics]
        slope, _ = statistics.linear_regression(range(first, len(values) + 1), values[first - 1 :])
        begun, ended = around(values, first), around(values, last)
        found.append(
            {
                "process": who,
                f"GiB at {first}": round(begun, 3),
                f"GiB at {last}": round(ended, 3),
                "growth": f"{100 * (ended / begun - 1):+.1f} %",
                "slope, MiB per 1,000 updates": round(slope * 1024 * 1000, 2),
                "updates": len(values),
            }
        )
    return found


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("overrides", nargs="*", help="of the config, e.g. improve.mode=async")
    options = parser.parse_args()
    first, last = (5, 20) if options.quick else (100, 1000)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "soak"
        updates = ["improve.updates=20"] if options.quick else ["improve.updates=1000000"]
        command = [
            sys.executable,
            "-m",
            "pipeline",
            "run",
            str(ROOT / "configs" / "countdown.yaml"),
            "--run-dir",
            str(run_dir),
            "--quiet",
        ]
        with subprocess.Popen([*command, *SHORT, *updates, *options.overrides], cwd=ROOT) as process:
            try:
                process.wait(60 * options.minutes)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
        if process.returncode != 0:
            sys.exit(f"the run ended with {process.returncode}")
        metrics = [record for record in records(run_dir / METRICS) if record["stage"] == "improve"]
    if len(metrics) < last:
        sys.exit(f"only {len(metrics)} updates in {options.minutes:g} minutes: give it more")
    found = rows(metrics, first, last)
    print(table(found))
    every = [
        {key: record[key] for key in ("step", "driver_gib", "worker_gib")}
        for record in metrics[:: max(1, len(metrics) // 200)]
    ]
    report("soak", found, {"minutes": options.minutes, "overrides": options.overrides, "curve": every}, options.out)


if __name__ == "__main__":
    main()
