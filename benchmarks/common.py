"""What every benchmark shares: rounds that alternate between the sides, paired ratios, the machine's description, table
and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The packages are found without being installed, by the workers that Ray starts too.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
PACKAGES = ("torch", "transformers", "ray", "pyarrow", "numpy", "safetensors")


def arguments(doc: str | None, *, repeats: int = 5) -> argparse.ArgumentParser:
    """A parser with the three options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds that count, after one to warm up")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its numbers mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (default: benchmarks/results)")
    return parser


def machine() -> dict[str, Any]:
    """Where and with what the numbers were measured; a package that is not there is left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")  # only what the benchmark uses has threads worth telling
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads() if torch else None,
        "python": platform.python_version(),
        "packages": versions,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit, with a plus where the work tree differs from it; empty outside of git."""
    try:
        run = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run[0] + ("+" if run[1] else "")


def alternate(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """``repeats`` rounds in which every side is called once, the order reversed every other round, after one call each
    to warm up.

    A side returns its own measure (a rate or seconds). Returns the measures per side; position i of each is round i.
    """
    for side in sides.values():
        side()
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats):
        for name in reversed(list(sides)) if number % 2 else list(sides):
            measured[name].append(sides[name]())
    return measured


class Peer:
    """A script of ``benchmarks/peers`` under another environment's interpreter, kept alive between rounds.

    It gets ``settings`` as JSON in its first argument; then each ``ask`` is one JSON line to it and one back.
    """

    def __init__(self, python: str, script: str, settings: Mapping[str, Any], *, threads: int) -> None:
        # PASSIVE: its threads must not spin while the other side is measured.
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [python, str(ROOT / "benchmarks" / "peers" / script), json.dumps(settings)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: Any) -> Any:
        """The peer's answer; ``RuntimeError`` when it has died."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with exit code {self._process.wait()}; what it said is above")
        return json.loads(line)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()  # the end of its input ends it
        self._process.wait(60)


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """``a / b`` round by round: ``{"median", "min", "max"}``."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def spread(values: Sequence[float]) -> str:
    """Median with smallest and largest, for a table's cell."""
    return f"{short(statistics.median(values))} ({short(min(values))} - {short(max(values))})"


def short(value: float) -> str:
    """Three digits, or the whole number where it has more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, which share their keys, as a Markdown table that reads well on a terminal."""
    cells = [list(rows[0]), *([short(v) if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def report(name: str, rows: Sequence[Mapping[str, Any]], data: Mapping[str, Any], results_dir: Path) -> Path:
    """Print the table and write ``results_dir/name.json``: benchmark, command, machine, rows, and ``data`` (the raw
    repeats)."""
    # Where things lie on one machine means nothing on another.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    content = {
        "benchmark": name,
        "command": " ".join(["python", *words]),
        "machine": machine(),
        "rows": list(rows),
        **data,
    }
    results_dir.mkdir(parents=True, exist_ok=True)
    path = results_dir / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))
    print(f"written: {path}")
    return path
