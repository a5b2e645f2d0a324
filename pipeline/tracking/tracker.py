"""Copies a run to MLflow. The truth is ``metrics.jsonl``; the copy may lag and never delays training.

Calls go through a queue to a separate thread. While the store is away they wait there and are retried; times and steps
are fixed when a metric is logged, so one that arrives twice is stored once. Each stage is one flat run; after
a restart it continues under the id kept in ``mlflow.json``, without a doubled step.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from configs.redaction import without_secrets
from configs.schema import Tracking
from pipeline.runs.environment import git_commit
from pipeline.runs.layout import METRICS
from pipeline.tracking.mlflow_store import Data, MlflowRun, MlflowStore, quiet_mlflow, valid_key
from pipeline.tracking.mlflow_traces import store_traces
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.system_metrics import Sampler
from pipeline.tracking.traces import RolloutTrace
from pipeline.tracking.uris import experiment_of, flatten, tracking_uri

Status = Literal["FINISHED", "FAILED", "KILLED"]
START_SECONDS = 60.0
"""How long ``start`` waits for the store to name the run."""
DRAIN_SECONDS = 15.0
"""How long ``finish`` waits for what is still in the queue."""
TRACES_AT_ONCE, TRACES_SECONDS = 10, 60.0
"""Traces of a call, and how long ``settle`` waits for those that are still in the queue."""
_LONGEST_TAG = 5000
_LOG = logging.getLogger(__name__)


class Tracker:
    """One MLflow run per stage. With ``settings.enabled`` false every method does nothing.

    ``group`` ties the stages of one run folder together (tag ``group``). Used by the driver only.
    """

    def __init__(
        self, settings: Tracking, run_dir: Path, group: str, note: Callable[[str, str], None] = lambda kind, text: None
    ) -> None:
        self._settings, self._run_dir, self._group = settings, run_dir, group
        self.uri = tracking_uri(settings.uri if settings.enabled else None, run_dir)
        self._outbox: Outbox | None = None
        self._run: MlflowRun | None = None
        self._sampler: Sampler | None = None
        if settings.enabled:
            quiet_mlflow()
            self._outbox = Outbox(note)
            self._outbox.start()
            # The tables of a new sqlite store take seconds: begun now, while the models are loaded.
            store = MlflowStore(self.uri, experiment_of(settings), run_dir)
            self._store = store
            self._outbox.put("opening the store", store.open)

    def start(
        self, stage: str, params: Mapping[str, Any], tags: Mapping[str, str], patience: float = START_SECONDS
    ) -> str:
        """Begin a stage's run, or continue the one this run folder began; returns its id.

        The id is empty when tracking is off or the store is away: then the run is made when it is back.
        """
        if self._outbox is None:
            return ""
        about = {
            "group": self._group,
            "stage": stage,
            "git_commit": git_commit(),
            "ray_job_id": os.environ.get("RAY_JOB_ID", ""),
        }
        wanted = {
            key: value[:_LONGEST_TAG] for key, value in (about | dict(tags) | self._settings.tags).items() if value
        }
        self._run = run = MlflowRun(
            self._store, self._run_dir, stage, f"{self._group}/{stage}", wanted, flatten(params)
        )
        self._outbox.put(f"run {run.name}", run.begin)
        self._outbox.put(f"the parameters of {run.name}", run.log_params)
        if self._settings.system_metrics is not None:
            self._sampler = Sampler(self._settings.system_metrics, partial(self._system, run))
            self._sampler.start()
        if not self._outbox.drained(patience):
            _LOG.warning("tracking: %s has no run id yet: the store is slow or away", run.name)
        return run.id

    def log(self, metrics: Mapping[str, float], step: int, when: float | None = None) -> None:
        """Store metrics of a step, in one call; steps that had to wait share one. Returns at once. ``when``: Unix time;
        ``None``: now."""
        if self._outbox is not None and self._run is not None and metrics:
            run, copy = self._run, {valid_key(k): float(v) for k, v in metrics.items()}
            run.waiting.append((copy, step, int(1000 * (time.time() if when is None else when))))
            self._outbox.put(f"step {step}", run.send)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a copy of a file or of a folder's files; they must stay until ``finish``."""
        if self._outbox is not None and self._run is not None:
            run = self._run
            self._outbox.put(f"artifact {path}", lambda: run.artifact(path, folder))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Tag the stage's run."""
        if self._outbox is not None and self._run is not None and tags:
            run, wanted = self._run, {valid_key(name)[:250]: value[:_LONGEST_TAG] for name, value in tags.items()}
            self._outbox.put(f"tags of {run.name}", lambda: run.tag(wanted))

    def dataset(self, data: Data) -> None:
        """Record that the run read this data (nothing is copied)."""
        if self._outbox is not None and self._run is not None:
            run = self._run
            self._outbox.put(f"dataset {data.name}", lambda: run.dataset(data))

    def finish(
        self,
        status: Status,
        patience: float = DRAIN_SECONDS,
        traces: Callable[[], Sequence[RolloutTrace]] | None = None,
    ) -> bool:
        """End the stage's run and wait a little for the queue; whether all was stored. ``traces`` are read and stored
        after that, while other stages work."""
        if self._outbox is None or self._run is None:
            return True
        run, self._run = self._run, None
        if self._sampler is not None:
            self._sampler.end()
            self._sampler = None
        when = int(time.time() * 1000)
        self._outbox.put(f"end of {run.name}", lambda: run.end(status, when))
        sent = self._outbox.drained(patience)
        if not sent:
            _LOG.warning(
                "tracking: the store did not take everything of %s yet; latent-control sync %s sends it",
                run.name,
                self._run_dir,
            )
        if traces is not None:
            self._outbox.put(f"the rollouts of {run.name}", lambda: self._queue_traces(run, traces()))
        return sent

    def _queue_traces(self, run: MlflowRun, traces: Sequence[RolloutTrace]) -> None:
        """In small calls: what the store did not take is tried again alone."""
        assert self._outbox is not None
        for first in range(0, len(traces), TRACES_AT_ONCE):
            some = traces[first : first + TRACES_AT_ONCE]
            self._outbox.put(f"{len(some)} rollouts of {run.name}", partial(store_traces, run, some))

    def settle(self, patience: float = TRACES_SECONDS) -> None:
        """Wait for what the last stage left in the queue."""
        if self._outbox is not None:
            self._outbox.drained(patience)

    def _system(self, run: MlflowRun, metrics: Mapping[str, float]) -> None:
        """Called by the sampler's thread. MLflow's own monitor gives up at the first failed call; these samples
        wait in the queue."""
        assert self._outbox is not None
        when = int(1000 * time.time())
        self._outbox.put("system metrics", lambda: run.system(metrics, when))

    def lost(self) -> str:
        """What the store lacks of this run, and how to send it; "" when it has all."""
        if self._outbox is None:
            return ""
        # A database that was deleted takes all that is written, through the connection that still has it open.
        gone = self.uri.startswith("sqlite:///") and not Path(self.uri.removeprefix("sqlite:///")).is_file()
        lost = "its file was deleted" if gone else self._outbox.lost()
        where = f"the MLflow store {without_secrets(self.uri)} lacks a part of this run: {lost}"
        return lost and f"{where}; latent-control sync {self._run_dir} sends what {METRICS} has"

    def close(self) -> None:
        """Let the thread end; ``finish`` first."""
        if self._outbox is not None:
            self._outbox.close()
