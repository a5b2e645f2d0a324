"""What a run says while it works: ``metrics.jsonl``, the tracker, and one display for people.

On a terminal: a live panel with progress, the key metrics and the reward's curve. Elsewhere (Ray job logs, CI): one plain
line of at most 80 columns per logged step.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline import lines, stopping
from pipeline.durable import write_atomic
from pipeline.events import Events

METRICS = "metrics.jsonl"
KEY_METRICS = (
    "reward",
    "success",
    "loss",
    "nll_codes",
    "nll",
    "kl",
    "staleness_mean",
    "code_perplexity",
    "alive_share",
    "entropy",
    "agreement",
)
"""Shown first, in this order, where they are logged; matched against the last part of a metric's name."""
COLUMNS = 80
_SHOWN = 5
_RESERVED = ("stage", "step", "time", "crc32")
_BARS = "▁▂▃▄▅▆▇█"


class _Tracker(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...


def number(value: float) -> str:
    """A short form of a number: ``0.512``, ``1234``, ``3.1e-05``."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """A short form of a time span: ``42s``, ``5m20s``, ``1h02m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def sparkline(values: list[float]) -> str:
    """One character per value, its height between the smallest and the largest."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((v - low) * scale)] for v in values)


def key_metrics(metrics: Mapping[str, float], count: int = _SHOWN) -> list[tuple[str, float]]:
    """The metrics to show: the best known ones first, then the others in their order; by the last part of their names."""
    short: dict[str, float] = {}
    for name, value in metrics.items():
        short.setdefault(name.rsplit("/", 1)[-1], value)
    ranked = [name for name in KEY_METRICS if name in short] + [name for name in short if name not in KEY_METRICS]
    return [(name, short[name]) for name in ranked[:count]]


class _Progress:
    """Where one stage stands, and how to show it."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.step = name, total, 0
        self.metrics: dict[str, float] = {}
        self.rewards: deque[float] = deque(maxlen=48)
        # An earlier start's updates took none of this one's time: the first logged step tells where this one began.
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in a logged step."""
        self._recent.append((step, time.monotonic()))
        self.step = step
        self.metrics |= metrics
        self.rewards.extend(v for name, v in metrics.items() if name.rsplit("/", 1)[-1] == "reward" and math.isfinite(v))

    @property
    def seconds(self) -> float:
        """Seconds per update, over the last logged steps."""
        if not self._recent:
            return 0.0
        (first, then), (last, now) = self._recent[0], self._recent[-1]
        return (now - then) / (last - first) if last > first else 0.0

    @property
    def left(self) -> float:
        """Seconds until the stage's last update."""
        return max(0, self.total - self.step) * self.seconds

    def line(self, metrics: Mapping[str, float]) -> str:
        """One plain line of at most 80 columns; key metrics that do not fit are left out."""
        width = len(str(self.total))
        line = f"{self.name:<8} {self.step:>{width}}/{self.total}"
        tail = f"  {self.seconds:.1f}s  ETA {clock(self.left)}" if self.seconds else ""
        for name, value in key_metrics(metrics):
            part = f"  {name} {number(value)}"
            if len(line) + len(part) + len(tail) > COLUMNS:
                break
            line += part
        return line + tail

    def panel(self) -> Group:
        """The live display."""
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(1, self.total), completed=self.step, width=28)
        eta = f"ETA {clock(self.left)}" if self.seconds else ""
        head.add_row(Text(self.name, "bold"), bar, f"{self.step}/{self.total}", f"{self.seconds:.2f} s/update", eta)
        values = Text("   ").join(Text.assemble((f"{name} ", "dim"), number(value)) for name, value in key_metrics(self.metrics))
        parts: list[Table | Text] = [head, values]
        if len(self.rewards) > 1:
            rewards = list(self.rewards)
            parts.append(Text.assemble(("reward ", "dim"), (sparkline(rewards), "green"), f" {number(rewards[-1])}"))
        return Group(*parts)


def records(path: Path) -> list[Mapping[str, Any]]:
    """The whole lines of a ``metrics.jsonl``; none where there is no such file."""
    found = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [record for line in found if (record := _record(line)) is not None]


def total(path: Path, stage: str, metric: str) -> float:
    """Sum of ``metric`` over the steps of ``stage`` in a ``metrics.jsonl``: earlier starts of the run count too."""
    return sum(float(r.get(metric) or 0.0) for r in records(path) if r.get("stage") == stage)


class RunLog:
    """Writes ``run_dir/metrics.jsonl`` and shows how the run gets on.

    Each line is ``{"stage": "improve", "step": 42, "time": <unix s>, "reward": 0.5, ..., "crc32": "..."}``, written as it happens;
    numbers that are not finite are null. ``quiet`` shows nothing, but writes all the same.
    """

    def __init__(self, run_dir: Path, *, quiet: bool = False, tracker: _Tracker | None = None, console: Console | None = None) -> None:
        self.path = run_dir / METRICS
        self._tracker, self._quiet = tracker, quiet
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._progress: _Progress | None = None
        self._live: Live | None = None
        run_dir.mkdir(parents=True, exist_ok=True)
        self._events = Events(run_dir)
        if self.path.is_file():
            self._keep(lambda record: True)
        self._file = self.path.open("a", encoding="utf-8")

    @contextmanager
    def stage(self, name: str, total_updates: int) -> Iterator[None]:
        """Show the progress of a stage while it works."""
        self._progress = progress = _Progress(name, total_updates)
        try:
            if self._quiet or not self._console.is_terminal:
                yield
            else:
                with Live(console=self._console, refresh_per_second=4, transient=True, get_renderable=progress.panel) as self._live:
                    yield
                if progress.metrics:
                    self._print(progress.line(progress.metrics))
        finally:
            self._progress = self._live = None

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step: file first, then tracker and display. ``Stopped`` when the run was asked to end meanwhile."""
        taken = [name for name in _RESERVED if name in metrics]
        if taken:
            raise ValueError(f"a metric cannot be called {taken[0]!r}: metrics.jsonl uses that key itself")
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(lines.line({"stage": stage, "step": step, "time": round(time.time(), 3)} | finite))
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log(values, step)
        progress = self._progress
        if progress is None or progress.name != stage:
            progress = _Progress(stage, step)
        progress.advance(step, values)
        if self._live is None:
            self._print(progress.line(values))
        stopping.check()

    def snapshot(self, path: Path) -> None:
        """Write all lines so far to ``path``."""
        path.write_bytes(b"".join(line for line in self.path.read_bytes().splitlines(keepends=True) if _record(line) is not None))

    def restore(self, path: Path) -> None:
        """Go back to what ``snapshot`` wrote, whatever became of the lines since."""
        self._file.close()
        lost = set(path.read_bytes().splitlines()) - set(self.path.read_bytes().splitlines())
        if lost:
            self.message(f"{METRICS}: {len(lost)} lines were missing or damaged, put back from {path.parent.name}", "lines_restored")
        write_atomic(self.path, path.read_bytes())
        self._file = self.path.open("a", encoding="utf-8")

    def truncate(self, stage: str, step: int) -> None:
        """Drop the lines of ``stage`` after ``step``: a resumed stage will write them again."""
        self._file.close()
        self._keep(lambda record: record.get("stage") != stage or int(record.get("step", 0)) <= step)
        self._file = self.path.open("a", encoding="utf-8")

    def message(self, text: str, kind: str = "", **facts: Any) -> None:
        """Show a line of text; one of a kind goes to ``events.jsonl``, too."""
        if kind:
            self._events.note(kind, text, **facts)
        self._print(text)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False)
            self._console.file.flush()

    def _keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Rewrite the file with the records that are ``wanted``, if any must go; a line that a kill tore goes with a message."""
        kept, dropped = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = _record(line)
            if record is None:
                self.message(f"{METRICS}: dropped a torn or damaged line {line[:40]!r}", "line_dropped")
            if record is not None and wanted(record):
                kept.append(line)
            else:
                dropped += 1
        if dropped:
            write_atomic(self.path, b"".join(kept))


def _record(line: bytes) -> Mapping[str, Any] | None:
    """The record of a whole line that is as it was written; lines of older versions have no checksum, and no word but the stage's name."""
    return lines.parsed(line, unchecked=lambda record: not any(isinstance(v, str) for name, v in record.items() if name != "stage"))
