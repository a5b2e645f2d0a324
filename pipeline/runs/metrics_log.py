"""Reads and writes ``metrics.jsonl``, one checksummed JSON object per line.

The writer also feeds tracker and display.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean as mean
from typing import Any, Protocol

from configs.redaction import without_secrets
from pipeline.console.displays import Display, automatic
from pipeline.console.progress import Ahead
from pipeline.runs import interrupts, manifest
from pipeline.runs.events import Events
from pipeline.runs.layout import METRICS
from pipeline.runs.stage_table import ONLINE
from pipeline.storage import checksummed_jsonl
from pipeline.storage.atomic import write_atomic
from rollout_workers import telemetry

RECENT = 10
_BARE = {"alive_codes", "alive_share", "code_perplexity"}
_RESERVED = ("stage", "step", "time", "crc32")


class _Tracker(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...


class _Mirror(Protocol):
    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None: ...


def records(path: Path) -> list[Mapping[str, Any]]:
    """The records of a ``metrics.jsonl`` in order; none where there is no such file.

    A torn line and a line whose checksum fails are skipped: its numbers are not what was logged.
    """
    found = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [record for line in found if (record := record_of(line)) is not None]


def total(path: Path, stage: str, metric: str) -> float:
    """Sum of ``metric`` over the steps of ``stage`` in a ``metrics.jsonl``: earlier starts of the run count too."""
    return sum(series(path, stage, metric))


def series(path: Path, stage: str, metric: str) -> list[float]:
    """Values of ``metric`` at the steps of ``stage`` that logged a finite one, in the order of the file."""
    return [float(r[metric]) for r in records(path) if r.get("stage") == stage and r.get(metric) is not None]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last ``RECENT`` updates: what a run's first and last reward are, wherever they are
    shown."""
    return mean(values[:RECENT]), mean(values[-RECENT:])


class RunLog:
    """Writes ``run_dir/metrics.jsonl`` and shows the progress of the run.

    Each line is ``{"stage": "improve", "step": 42, "time": <unix s>, "reward": 0.5, ..., "crc32": "..."}``, written as
    it happens; numbers that are not finite are null. ``quiet`` shows nothing, but writes all the same; ``display`` says
    how to show otherwise.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        quiet: bool = False,
        tracker: _Tracker | None = None,
        mirror: _Mirror | None = None,
        display: Display | None = None,
        events: Events | None = None,
    ) -> None:
        self.path = run_dir / METRICS
        self._tracker, self._mirror = tracker, mirror
        self.display = display or (Display() if quiet else automatic())
        run_dir.mkdir(parents=True, exist_ok=True)
        self._events = events or Events(run_dir)
        if self.path.is_file():
            self._keep(lambda record: True)
        self._file = self.path.open("a", encoding="utf-8")

    @contextmanager
    def showing(self, ahead: Ahead) -> Iterator[None]:
        """The display of a whole run, from its first stage to its last."""
        self.display.begin(ahead)
        try:
            yield
        finally:
            self.display.close()

    def begin(self, stage: str, total_updates: int) -> None:
        """A stage of ``total_updates`` (0: it has none) starts; what an earlier start logged of it counts as done."""
        earlier = [(int(r["step"]), _numbers(r)) for r in records(self.path) if r.get("stage") == stage]
        self._events.at |= {"stage": stage, "update": earlier[-1][0] if earlier else 0}
        self.display.stage_begins(stage, total_updates, earlier)

    def advance(self, stage: str, step: int) -> None:
        """A step with nothing to log."""
        self.display.step(stage, step, {})

    def done(self, stage: str, *, kept: bool = False, **facts: Any) -> None:
        """A stage is done; ``facts`` (its checkpoint, its metrics) are for programs."""
        self.display.stage_ends(stage, kept=kept, **facts)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """``record`` the metrics of a step and show them. ``Stopped`` when the run was asked to end meanwhile."""
        self.display.step(stage, step, self.record(stage, step, metrics))
        interrupts.check()

    def record(self, stage: str, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Write the metrics of a step, file first, then tracker; returns them as numbers.

        Raises:
            ValueError: a metric is called as one of the line's own keys.
        """
        taken = [name for name in _RESERVED if name in metrics]
        if taken:
            raise ValueError(f"a metric cannot be called {taken[0]!r}: metrics.jsonl uses that key itself")
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(checksummed_jsonl.line({"stage": stage, "step": step, "time": round(time.time(), 3)} | finite))
        self._file.flush()
        self._events.at |= {"stage": stage, "update": step}
        telemetry.step(self._events.at["run"], stage, step, values)
        if self._tracker is not None:
            self._tracker.log(values, step)
        if self._mirror is not None:
            self._mirror.log(stage, step, values)
        return values

    def snapshot(self, path: Path) -> None:
        """Write all lines so far to ``path``."""
        path.write_bytes(
            b"".join(line for line in self.path.read_bytes().splitlines(keepends=True) if record_of(line) is not None)
        )

    def restore(self, path: Path) -> None:
        """Go back to what ``snapshot`` wrote, whatever was written since."""
        self._file.close()
        lost = set(path.read_bytes().splitlines()) - set(self.path.read_bytes().splitlines())
        if lost:
            self.message(
                f"{METRICS}: {len(lost)} lines were missing or damaged, put back from {path.parent.name}",
                "lines_restored",
            )
        self._rewrite(path.read_bytes())
        self._file = self.path.open("a", encoding="utf-8")

    def truncate(self, stage: str, step: int) -> None:
        """Drop the lines of ``stage`` after ``step``: a resumed stage will write them again."""
        self._file.close()
        self._keep(lambda record: record.get("stage") != stage or int(record.get("step", 0)) <= step)
        self._file = self.path.open("a", encoding="utf-8")

    def message(self, text: str, kind: str = "", **facts: Any) -> None:
        """Show a line of text; one of a kind goes to ``events.jsonl``, too."""
        text = without_secrets(text)
        if kind:
            self._events.note(kind, text, **facts)
        self.display.message(text, kind)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Rewrite the file with the records that are ``wanted``, if any must go; a line that a kill tore goes with a
        message."""
        kept, dropped = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = record_of(line)
            if record is None:
                self.message(f"{METRICS}: dropped a torn or damaged line {line[:40]!r}", "line_dropped")
            if record is not None and wanted(record):
                kept.append(line)
            else:
                dropped += 1
        if dropped:
            self._rewrite(b"".join(kept))

    def _rewrite(self, data: bytes) -> None:
        """Replace the file by what counts from now on, and let the manifest know."""
        write_atomic(self.path, data)
        manifest.know(self.path.parent, ())


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(v) for name, v in record.items() if name not in _RESERVED and isinstance(v, int | float)}


def record_of(line: bytes) -> Mapping[str, Any] | None:
    """The record of a whole line that is as it was written; lines of older versions have no checksum, and no word but
    the stage's name."""
    record = checksummed_jsonl.parsed(
        line, unchecked=lambda record: not any(isinstance(v, str) for name, v in record.items() if name != "stage")
    )
    return record and with_whose(str(record.get("stage", "")), record)


def with_whose(stage: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a stage with the measures of usage named for who chose the codes, which older versions left out."""
    whose = "rollouts" if stage in ONLINE else "inverse_dynamics"
    return {f"{whose}_{name}" if name in _BARE else name: value for name, value in found.items()}
