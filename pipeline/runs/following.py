"""Follows ``metrics.jsonl`` while a run writes it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import numpy as np

from pipeline.runs.metrics_log import record_of

MOST_BYTES = 8 << 20
"""Read at once; the rest at the next look."""


class _Columns:
    """One stage's steps and metrics; NaN where a step has none."""

    def __init__(self) -> None:
        self.steps = array("d")
        self.values: dict[str, array[float]] = {}

    def add(self, step: float, values: dict[str, float]) -> None:
        for name in values.keys() - self.values.keys():
            self.values[name] = array("d", [math.nan] * len(self.steps))
        self.steps.append(step)
        for name, column in self.values.items():
            column.append(values.get(name, math.nan))


class MetricsFollower:
    """The metrics ``wanted`` of every stage, by step. Lines that are torn or damaged are left out; a file that was
    rewritten (a run was resumed) is read again from its start."""

    def __init__(self, path: Path, wanted: Collection[str]) -> None:
        self._path, self._wanted = path, frozenset(wanted)
        self._inode, self._read, self._torn = 0, 0, b""
        self.stages: dict[str, _Columns] = {}
        self.last: tuple[str, int, float] = ("", 0, 0.0)
        """Stage, step and Unix time of the last line."""

    def poll(self) -> bool:
        """Read what is new; whether there was anything."""
        with suppress(OSError):
            found = self._path.stat()
            if (found.st_ino, found.st_size >= self._read) != (self._inode, True):
                MetricsFollower.__init__(self, self._path, self._wanted)
                self._inode = found.st_ino
            if found.st_size > self._read:
                with self._path.open("rb") as file:
                    file.seek(self._read)
                    self._take(file.read(MOST_BYTES))
                return True
        return False

    def series(self, stage: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values [U] of the steps that logged a finite one."""
        columns = self.stages.get(stage)
        if columns is None or metric not in columns.values:
            return np.empty(0), np.empty(0)
        steps, values = np.array(columns.steps), np.array(columns.values[metric])
        there = np.isfinite(values)
        return steps[there], values[there]

    def _take(self, data: bytes) -> None:
        self._read += len(data)
        *lines, self._torn = (self._torn + data).split(b"\n")
        for line in lines:
            if (record := record_of(line + b"\n")) is None or not isinstance(record.get("step"), int):
                continue
            stage, time = str(record.get("stage", "")), record.get("time")
            numbers = {n: float(v) for n in self._wanted if isinstance(v := record.get(n), int | float)}
            self.stages.setdefault(stage, _Columns()).add(record["step"], numbers)
            self.last = (stage, record["step"], float(time) if isinstance(time, int | float) else 0.0)
