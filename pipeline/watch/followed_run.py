"""A run folder that is read while it grows; nothing in it is changed."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from configs.loading import load_config
from pipeline.evaluation.outcome_file import read_outcomes
from pipeline.pages import reward_report
from pipeline.pages.records import ReportSection, as_data
from pipeline.pages.report import codebook, cost, curves, results
from pipeline.pages.report.origin import mlflow_links
from pipeline.pages.report.sources import read_sources
from pipeline.replay.following import RolloutFollower
from pipeline.replay.heldout import heldout_table
from pipeline.replay.search import RolloutSearch, rows_of, rows_where, search
from pipeline.runs.following import MetricsFollower
from pipeline.runs.layout import CONFIG, EXPLORER, METRICS, OUTCOMES, REPLAY, REPORT
from pipeline.runs.stage_table import settings_of
from pipeline.runs.status import status_of
from pipeline.runs.summary import collapse_words, read_summary
from pipeline.tracking.uris import read_record
from pipeline.watch import time_spent
from pipeline.watch.model_process import MOST_GIB, ModelProcess
from pipeline.watch.token_texts import token_texts

SHOWN = 25
"""Rollouts of an answer."""
UNSHOWN = {"prompt_tokens", "action_logp", "turn_rewards", "world_hash"}
"""What only the model asks for."""
_LOG = logging.getLogger(__name__)


class FollowedRun:
    """A run as the page shows it. ``poll`` looks for what is new; the rest answers from memory."""

    def __init__(self, folder: Path, most_gib: float = MOST_GIB) -> None:
        """``ValueError`` where its config cannot be read. ``most_gib``: weights that its model may have to be
        loaded."""
        self.folder, self.model = folder, ModelProcess(folder, most_gib)
        self.config = load_config(folder / CONFIG, [], check_paths=False)
        self._metrics = MetricsFollower(folder / METRICS, {*curves.METRICS, *time_spent.METRICS})
        self._rollouts = RolloutFollower(folder / REPLAY)
        self._lock = threading.Lock()
        self._heldout: tuple[int, Any] = (0, heldout_table(()))
        self.parts: dict[str, str] = {}
        """What the page shows besides searches, as JSON: ``state``, ``curves``, ``time``, ``rollouts``."""

    def poll(self) -> None:
        """Look for what is new, and renew the ``parts`` that it changes."""
        with self._lock:
            if self._metrics.poll() or "curves" not in self.parts:
                self.parts["curves"] = json.dumps(as_data(curves.learning_curves(self)))
                self.parts["time"] = json.dumps(as_data(time_spent.time_spent(self)))
            if self._rollouts.poll() or "rollouts" not in self.parts:
                self.parts["rollouts"] = json.dumps({"total": self._rollouts.total})
            self.parts["state"] = json.dumps(self._state())

    def series(self, stage: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """As ``pages.report.curves.Measured`` says."""
        return self._metrics.series(stage, metric)

    def found(self, wanted: RolloutSearch, first: int, variant: str = "") -> dict[str, Any]:
        """Rollouts ``first`` to ``first + SHOWN`` of those that meet ``wanted``, or of the evaluation's answers of a
        ``variant``; ``ValueError`` for a pattern that is wrong."""
        table = self._table() if not variant else self.heldout()
        table = table.take(rows_where(table, "variant", variant)) if variant else table
        hits = search(table, wanted)
        return {
            "total": len(hits.rows),
            "searched": hits.searched,
            "kept": len(table),
            "stored": len(table) if variant else self._rollouts.total,
            "rows": self._shown(rows_of(table, hits.rows[first : first + SHOWN])),
        }

    def group(self, group_id: str) -> list[dict[str, Any]]:
        """A prompt's rollouts of one update, each with its advantage: reward - mean reward of the group; or all models'
        answers to a held-out prompt."""
        return self._shown(self._group(group_id))

    def _group(self, group_id: str) -> list[dict[str, Any]]:
        table = self._table()
        rows = rows_of(table, rows_where(table, "group_id", group_id))
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        mean = sum(rewards) / len(rewards) if rewards else 0.0
        for row in rows:
            row["advantage"] = None if row["reward"] is None else row["reward"] - mean
        if not rows:
            table = self.heldout()
            rows = [row | {"advantage": None} for row in rows_of(table, rows_where(table, "group_id", group_id))]
        return rows

    def explained(self, rollout_id: str) -> Any:
        """Counterfactuals of any rollout in memory or of the evaluation (``ModelWork.explain``).

        Raises:
            LookupError: there is no such rollout.
            RefusedRequest: it cannot be explained.
        """
        for table in (self._table(), self.heldout()):
            for row in rows_of(table, rows_where(table, "rollout_id", rollout_id)):
                group = {one["rollout_id"]: one["advantage"] for one in self._group(row["group_id"])}
                asked = row | {"advantage": group.get(rollout_id)}
                return self.model.ask("explain", json.dumps(asked).encode())
        raise LookupError(f"{self.folder.name} has no rollout {rollout_id[:80]!r} in memory, nor such an answer")

    def rewards(self) -> list[ReportSection]:
        """Parts of the reward over the rollouts in memory; ``ValueError`` before there are any."""
        self.poll()
        table = self._table()
        columns = [name for name in reward_report.COLUMNS if name in table.column_names]
        rows = rows_of(table.select(columns), np.arange(len(table)))
        found = reward_report.report_of(rows, self.config.reward.weights)
        if not found["levels"]:
            raise ValueError(f"{self.folder.name} has no judged rollout yet")
        return reward_report.sections(found)

    def result(self) -> list[ReportSection]:
        """The report's: held-out results, and the codebook."""
        sources = read_sources(self.folder)
        return [results.result(sources), codebook.codebook(sources)]

    def cost(self) -> list[ReportSection]:
        """The report's."""
        return [cost.cost(read_sources(self.folder))]

    def heldout(self) -> Any:
        """The evaluation's answers (``heldout_table``); none before there is an evaluation."""
        path = self.folder / OUTCOMES
        modified = path.stat().st_mtime_ns if path.is_file() else 0
        if modified != self._heldout[0]:
            self._heldout = modified, heldout_table(read_outcomes(path))
        return self._heldout[1]

    def close(self) -> None:
        """End the model's process."""
        self.model.close()

    def _table(self) -> Any:
        if not self.parts:  # nobody listens to this run yet
            self.poll()
        return self._rollouts.table

    def _shown(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with the texts of their tokens, ``pieces``; ``None`` where the tokenizer is not on this machine."""
        pieces = self._words
        known = [row | {"pieces": pieces(row["tokens"]) if pieces and row["tokens"] else None} for row in rows]
        return [{name: value for name, value in row.items() if name not in UNSHOWN} for row in known]

    @cached_property
    def _words(self) -> Callable[[Sequence[int]], list[str]] | None:
        try:
            return token_texts(self.config.base.model)
        except (ValueError, OSError) as error:
            _LOG.warning("%s: responses are shown without their tokens: %s", self.folder.name, error)
            return None

    def _state(self) -> dict[str, Any]:
        summary, tracked = read_summary(self.folder), read_record(self.folder)
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
            "said": [*results.achieved(summary.get("evaluation") or {}), *collapse_words(summary)],
            "links": as_data(mlflow_links(tracked, self.folder.name)[:1]) if tracked else [],
            "model": bool(summary.get("stages")),
            "variants": list(dict.fromkeys(self.heldout()["variant"].to_pylist())),
        }


class FollowedRuns:
    """The runs of a folder; or one run first, then those beside it, to compare it with."""

    MOST = 8
    """Followed at a time; the one that was asked for least lately is forgotten."""

    def __init__(self, target: Path, most_gib: float = MOST_GIB) -> None:
        self._most_gib = most_gib
        target = target.absolute()
        self._first = target.name if (target / CONFIG).is_file() else ""
        self._folder = target.parent if self._first else target
        self._open: dict[str, FollowedRun] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of the runs, the one that was asked for and then the newest first."""
        configs = {name: self._folder / name / CONFIG for name in os.listdir(self._folder)}
        begun = {name: os.path.getmtime(path) for name, path in configs.items() if os.path.isfile(path)}
        return sorted(begun, key=lambda name: (name == self._first, begun[name]), reverse=True)

    def run(self, name: str) -> FollowedRun:
        """The run of this name; ``LookupError`` where there is none."""
        with self._lock:
            if name in self._open and not (self._folder / name / CONFIG).is_file():
                self._open.pop(name).close()  # it was removed; another may take its name
            if name not in self._open:
                if name not in self.names():
                    raise LookupError(f"there is no run {name[:80]!r} in {self._folder}")
                self._open[name] = FollowedRun(self._folder / name, self._most_gib)
            self._open[name] = self._open.pop(name)  # the latest comes last
            while len(self._open) > self.MOST:
                self._open.pop(next(iter(self._open))).close()
            return self._open[name]

    def close(self) -> None:
        """End the models' processes."""
        for run in self._open.values():
            run.close()
