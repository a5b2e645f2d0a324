"""Appends to and reads ``events.jsonl``, one checksummed JSON object per event of a run, for ``latent-control
diagnose``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from configs.redaction import without_secrets
from pipeline.runs.layout import EVENTS
from pipeline.storage import checksummed_jsonl
from pipeline.storage.atomic import write_atomic
from rollout_workers import telemetry

Say = Callable[..., None]
"""``say(text, kind, **facts)``; without a kind the text is for the display only."""


class Events:
    """Appends to a run's events. Each line is on the disk when ``note`` returns: the next thing to happen may be a
    kill."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVENTS
        self.at: dict[str, Any] = {"run": run_dir.name}
        """What every event says besides its own facts: the run, and its stage and update once there is one."""

    def note(self, kind: str, text: str, **facts: Any) -> None:
        """``note("worker_lost", "worker 2 died: ...", worker=2)``; a full disk raises nothing: events report
        failures."""
        telemetry.count("events_total", run=self.at["run"], kind=kind)
        told = json.loads(without_secrets(json.dumps({"text": text} | self.at | facts, default=str)))
        line = checksummed_jsonl.line({"time": round(time.time(), 3), "kind": kind} | told)
        try:
            torn = self._path.is_file() and self._path.read_bytes()[-1:] not in (b"", b"\n")
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" * torn + line)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return

    def mend(self) -> None:
        """Drop the lines that are damaged, and note that."""
        _, damaged = checksummed_jsonl.read(self._path)
        if damaged:
            whole = [one for one in self._path.read_bytes().splitlines(keepends=True) if one not in damaged]
            write_atomic(self._path, b"".join(whole))
            self.note("line_dropped", f"{EVENTS}: dropped {len(damaged)} damaged lines, the first {damaged[0][:40]!r}")


def read_events(run_dir: Path) -> list[Mapping[str, Any]]:
    """All valid events, oldest first; none without a file."""
    return [record for record in checksummed_jsonl.read(run_dir / EVENTS)[0] if isinstance(record.get("kind"), str)]


def problems(run_dir: Path) -> list[str]:
    """What is wrong with the file."""
    damaged = checksummed_jsonl.read(run_dir / EVENTS)[1]
    return [f"{EVENTS} has {len(damaged)} damaged lines, the first {damaged[0][:40]!r}"] if damaged else []
