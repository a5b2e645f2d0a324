"""A run folder that is read while it grows; nothing in it is changed."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from configs.loading import load_config
from pipeline.pages.explorer.records import as_data
from pipeline.pages.report import curves
from pipeline.replay.following import RolloutFollower
from pipeline.replay.search import RolloutSearch, group_of, rows_of, search
from pipeline.runs.following import MetricsFollower
from pipeline.runs.layout import CONFIG, EXPLORER, METRICS, REPLAY, REPORT, SUMMARY
from pipeline.runs.stage_table import settings_of
from pipeline.runs.status import status_of
from pipeline.watch import time_spent
from pipeline.watch.token_texts import token_texts

SHOWN = 25
"""Rollouts of an answer."""
_LOG = logging.getLogger(__name__)


class FollowedRun:
    """A run as the page shows it. ``poll`` looks for what is new; the rest answers from memory."""

    def __init__(self, folder: Path) -> None:
        """``ValueError`` where its config cannot be read."""
        self.folder = folder
        self.config = load_config(folder / CONFIG, [], check_paths=False)
        self._metrics = MetricsFollower(folder / METRICS, {*curves.METRICS, *time_spent.METRICS})
        self._rollouts = RolloutFollower(folder / REPLAY)
        self._lock = threading.Lock()
        self.parts: dict[str, str] = {}
        """What the page shows besides searches, as JSON: ``state``, ``curves``, ``time``, ``rollouts``."""

    def poll(self) -> None:
        """Look for what is new, and renew the ``parts`` that it changes."""
        with self._lock:
            if self._metrics.poll() or "curves" not in self.parts:
                self.parts["curves"] = json.dumps(as_data(curves.learning_curves(self)))
                self.parts["time"] = json.dumps([asdict(one) for one in time_spent.time_spent(self)])
            if self._rollouts.poll() or "rollouts" not in self.parts:
                self.parts["rollouts"] = json.dumps({"total": self._rollouts.total})
            self.parts["state"] = json.dumps(self._state())

    def series(self, stage: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """As ``pages.report.curves.Measured`` says."""
        return self._metrics.series(stage, metric)

    def found(self, wanted: RolloutSearch, first: int) -> dict[str, Any]:
        """Rollouts ``first`` to ``first + SHOWN`` of those that meet ``wanted``; ``ValueError`` for a pattern that is
        wrong."""
        table = self._table()
        hits = search(table, wanted)
        return {
            "total": len(hits.rows),
            "searched": hits.searched,
            "kept": len(table),
            "stored": self._rollouts.total,
            "rows": self._shown(rows_of(table, hits.rows[first : first + SHOWN])),
        }

    def group(self, group_id: str) -> list[dict[str, Any]]:
        """A prompt's rollouts of one update, each with its advantage: reward - mean reward of the group."""
        table = self._table()
        rows = rows_of(table, group_of(table, group_id))
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        mean = sum(rewards) / len(rewards) if rewards else 0.0
        for row in rows:
            row["advantage"] = None if row["reward"] is None else row["reward"] - mean
        return self._shown(rows)

    def _table(self) -> Any:
        if not self.parts:  # nobody listens to this run yet
            self.poll()
        return self._rollouts.table

    def _shown(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with the texts of their tokens, ``pieces``; ``None`` where the tokenizer is not on this machine."""
        pieces = self._words
        return [row | {"pieces": None if pieces is None else pieces(row["tokens"])} for row in rows]

    @cached_property
    def _words(self) -> Callable[[Sequence[int]], list[str]] | None:
        try:
            return token_texts(self.config.base.model)
        except (ValueError, OSError) as error:
            _LOG.warning("%s: responses are shown without their tokens: %s", self.folder.name, error)
            return None

    def _state(self) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            summary = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
        stage, step, modified = self._metrics.last
        rewards = [values[-1] for name in curves.RL if len(values := self.series(name, "reward")[1])]
        return {
            "name": self.folder.name,
            "status": status_of(self.folder, self.config, summary, modified),
            "stage": stage,
            "step": step,
            "updates": int(getattr(settings_of(self.config, stage), "updates", 0)) if stage else 0,
            "modified": modified,
            "reward": float(rewards[0]) if rewards else None,
            "pages": [name for name in (EXPLORER, REPORT) if (self.folder / name).is_file()],
            "steer": f"latent-control steer {self.folder}" if summary.get("stages") else None,
        }


class FollowedRuns:
    """The runs of a folder, or one run."""

    MOST = 8
    """Followed at a time; the one that was asked for least lately is forgotten."""

    def __init__(self, target: Path) -> None:
        self._target, self._alone = target, (target / CONFIG).is_file()
        self._open: dict[str, FollowedRun] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of the runs, the newest first."""
        if self._alone:
            return [self._target.name]
        found = [path for path in self._target.iterdir() if (path / CONFIG).is_file()]
        return [path.name for path in sorted(found, key=lambda path: (path / CONFIG).stat().st_mtime, reverse=True)]

    def run(self, name: str) -> FollowedRun:
        """The run of this name; ``LookupError`` where there is none."""
        with self._lock:
            if name not in self._open:
                if name not in self.names():
                    raise LookupError(f"there is no run {name[:80]!r} in {self._target}")
                self._open[name] = FollowedRun(self._target if self._alone else self._target / name)
            self._open[name] = self._open.pop(name)  # the latest comes last
            while len(self._open) > self.MOST:
                del self._open[next(iter(self._open))]
            return self._open[name]
