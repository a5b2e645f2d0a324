"""What it costs to be killed: workers, driver, MLflow server, signals, exceptions, on runs of a tiny model; each
checked to the bit.

    python benchmarks/chaos.py [--quick] [--only workers driver store sigterm-sync ...] [--out DIR]

The scenarios are those of the slow tests (``tests/chaos/scenarios.py``), which hold them to their bars; here the
numbers are written down. ``--only`` runs some of them and keeps the results of the others that are in the folder
already.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import ROOT, arguments, report, spread
from models import endless

sys.path.insert(0, str(ROOT / "tests" / "chaos"))
import scenarios
from chaos_tools import Run, running

Scenario = Callable[[Path], dict[str, Any]]
BARS = {
    "workers": "20 workers killed (SIGKILL): seconds to full strength, median under 10",
    "driver": "driver killed (SIGKILL) at random points, resumed: bit-equal end, all",
    "store": "MLflow server away for a third of the run: every metric there once, steps as fast",
    "sigterm-sync": "SIGTERM to exit 0, sync: under 10 s",
    "sigterm-async": "SIGTERM to exit 0, async: under 10 s",
    "exception": "exception to exit with no process left: under 10 s",
    "silent": "worker stopped (SIGSTOP): seconds to its replacement, given 15 s to answer",
}


def planned(checkpoint: Path, *, quick: bool) -> dict[str, Scenario]:
    """By name."""
    few = 1 if quick else None

    def driver(folder: Path) -> dict[str, Any]:
        whole = Run(folder / "whole", checkpoint, "tracking.enabled=false").start()
        with running(whole):
            whole.end()
        return scenarios.driver_kills(folder, checkpoint, whole, few or 10)

    return {
        "workers": lambda folder: scenarios.worker_kills(folder, checkpoint, few or 20, last=5),
        "driver": driver,
        "store": lambda folder: scenarios.store_away(folder, checkpoint, 30 if quick else 240),
        "sigterm-sync": lambda folder: scenarios.seconds_to_leave(folder, checkpoint, "sync", few or 5),
        "sigterm-async": lambda folder: scenarios.seconds_to_leave(folder, checkpoint, "async", few or 5),
        "exception": lambda folder: scenarios.seconds_from_exception(folder, checkpoint),
        "silent": lambda folder: scenarios.stopped_worker(folder, checkpoint, 15.0),
    }


def result(name: str, found: Mapping[str, Any]) -> str:
    """What came out, in a cell."""
    if name == "workers":
        lost = (
            f"{found['rollouts lost']} rollouts lost, {found['rollouts doubled']} doubled, {found['updates']} updates"
        )
        return f"{spread(found['seconds'])} s; {lost}"
    if name == "driver":
        return (
            f"{found['bit-equal']} of {found['points']}, killed after updates "
            f"{', '.join(map(str, found['killed after update']))}"
        )
    if name == "store":
        steps = ", ".join(f"{where} {1000 * seconds:.0f}" for where, seconds in found["seconds a step"].items())
        return (
            f"complete{' after latent-control sync' * bool(found['needed besides'])}, {found['status']}; ms a "
            f"step: {steps}"
        )
    return f"{spread(found['seconds'])} s"


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--only", nargs="+", choices=list(BARS), default=list(BARS))
    options = parser.parse_args()
    kept = options.out / "chaos.json"
    found: dict[str, Any] = json.loads(kept.read_text())["measured"] if kept.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = endless(Path(folder))
        for name, scenario in planned(checkpoint, quick=options.quick).items():
            if name in options.only:
                (Path(folder) / name).mkdir()
                found[name] = scenario(Path(folder) / name)
                print(f"{name}: {result(name, found[name])}", file=sys.stderr, flush=True)
                rows = [
                    {"what is done, and the bar": BARS[name], "result": result(name, found[name])}
                    for name in BARS
                    if name in found
                ]
                report("chaos", rows, {"measured": found}, options.out)


if __name__ == "__main__":
    main()
