"""MLflow, in one file. The truth is ``metrics.jsonl``; this is a copy that may lag, and never holds training up.

Calls go through a queue to a thread of their own. While the store is away they wait there and are tried again; times
and steps are fixed when a metric is logged, so one that arrives twice is stored once. Each stage is one flat run; after
a restart it continues under the id kept in ``mlflow.json``, without a doubled step.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from configs.schema import Tracking
from pipeline.runs import manifest
from pipeline.runs.environment import git_commit
from pipeline.runs.layout import MLFLOW
from pipeline.storage.atomic import write_atomic
from pipeline.tracking.server import chart_link
from pipeline.tracking.system_metrics import Sampler

Status = Literal["FINISHED", "FAILED", "KILLED"]
START_SECONDS = 60.0
"""How long ``start`` waits for the store to name the run."""
DRAIN_SECONDS = 15.0
"""How long ``finish`` waits for what is still in the queue."""
AWAY_SECONDS = 2.0
"""How long both wait when the store did not answer before."""
_LONGEST_PARAM, _LONGEST_TAG = 6000, 5000
_PARAMS_AT_ONCE, _METRICS_AT_ONCE = 100, 1000
_FIRST_RETRY, _LONGEST_RETRY = 1.0, 30.0
_HOPELESS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "MALFORMED_REQUEST",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "NOT_IMPLEMENTED",
    }
)
_HOPELESS |= {"RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "ENDPOINT_NOT_FOUND", "INVALID_STATE"}
_DIGEST = 32  # MLflow takes up to 36 characters
SYSTEM = "system/"
"""MLflow's interface shows metrics of this name in a tab of their own."""
_SECRET = re.compile(r"([^&=]*(?:password|passwd|token|secret|key)[^&=]*=)[^&]*", re.IGNORECASE)
_LOG = logging.getLogger(__name__)


def tracking_uri(uri: str | None, run_dir: Path) -> str:
    """The store of a run: ``uri`` with a sqlite path made absolute; by default ``mlflow.db`` beside the run folders."""
    if uri is None:
        return f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        # MLflow would take a relative one from the working folder, which in a Ray job is a temporary one.
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def without_password(uri: str) -> str:
    """The URI as it may be written down: no password, no token in a user's place, no secret among its parameters."""
    parts = urlsplit(uri)
    if parts.password is not None:
        parts = parts._replace(netloc=f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}")
    elif parts.username and parts.scheme in ("http", "https"):
        parts = parts._replace(netloc=f"***@{parts.netloc.rpartition('@')[2]}")
    query = _SECRET.sub(r"\1***", parts.query)
    return uri if (parts, query) == (urlsplit(uri), parts.query) else urlunsplit(parts._replace(query=query))


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """``{"tracking_uri", "experiment_id", "runs": {stage: run id}}`` of a run folder; ``None`` when it was not
    tracked."""
    try:
        record = json.loads((run_dir / MLFLOW).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("runs"), dict) else None


def deep_link(experiment_id: str, *, server: str = "http://127.0.0.1:5000", group: str | None = None) -> str:
    """Address of the experiment's chart page (its own start page is about something else), one group's runs only if
    given."""
    return chart_link(experiment_id, server, {} if group is None else {"group": group})


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"improve": {"updates": 3}}`` -> ``{"improve.updates": "3"}``; lists and empty sections as JSON, no passwords
    of URIs."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[f"{prefix}{key}"] = without_password(text) if "://" in text else text
    return flat


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


class Outbox(threading.Thread):
    """Does calls one after the other, trying again while the store is away."""

    def __init__(self, note: Callable[[str, str], None]) -> None:
        super().__init__(name="tracking", daemon=True)
        self._note = note
        self._calls: deque[tuple[str, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        self._away = False
        self._closed = False

    def put(self, what: str, call: Callable[[], None]) -> None:
        """Queue a call; ``what`` names it in a warning."""
        with self._changed:
            self._calls.append((what, call))
            self._changed.notify_all()

    def drained(self, seconds: float) -> bool:
        """Wait until everything is done, at most ``seconds``, and not long while the store is away."""
        begun = time.monotonic()
        self._hurry.set()
        with self._changed:
            while (
                self._calls
                and self.is_alive()
                and time.monotonic() - begun < (min(seconds, AWAY_SECONDS) if self._away else seconds)
            ):
                self._changed.wait(0.1)
            return not self._calls

    def close(self) -> None:
        """End the thread once the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def run(self) -> None:
        """The thread."""
        pause = _FIRST_RETRY
        while True:
            with self._changed:
                while not self._calls and not self._closed:
                    self._changed.wait()
                if not self._calls:
                    return
                what, call = self._calls[0]
            if self._attempt(what, call):
                pause = _FIRST_RETRY
                with self._changed:
                    self._calls.popleft()
                    self._changed.notify_all()
            else:
                self._hurry.wait(pause)
                self._hurry.clear()
                pause = min(_LONGEST_RETRY, 2 * pause)

    def _attempt(self, what: str, call: Callable[[], None]) -> bool:
        """Whether the call is over with: done, or of no use to try again."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            call()
        except (MlflowException, OSError, SQLAlchemyError, ValueError, ImportError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            # Failures of the network are OSErrors, also the one that is a ValueError: an answer that is no JSON.
            ours = isinstance(error, FileNotFoundError | ImportError) or (
                isinstance(error, ValueError) and not isinstance(error, OSError)
            )
            hopeless = ours or getattr(error, "error_code", "") in _HOPELESS
            if hopeless:
                _LOG.warning("tracking: %s was not stored: %s", what, reason)
            elif not self._away:
                _LOG.warning(
                    "tracking: the store is away (%s): %s; training goes on, metrics are kept and sent later",
                    what,
                    reason,
                )
                self._note("tracking_away", f"the MLflow store is away: {reason}")
            self._away = self._away or not hopeless
            return hopeless
        if self._away:
            self._away = False
            _LOG.warning("tracking: the store is back")
            self._note("tracking_back", "the MLflow store is back")
        return True


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads: ``Data(name="countdown/train", digest=lambda: "5f0c...", kind="code", source='{"task":
    "countdown"}')``."""

    name: str
    digest: Callable[[], str]
    """SHA-256; computed in the tracker's thread, for files may be large."""
    kind: str
    """What MLflow calls the type of its source: "local" (a path), "code" (a generator)."""
    source: str
    """JSON."""
    context: str = "training"
    """What it is for: "training" or "evaluation"."""


class Tracker:
    """One MLflow run per stage. With ``settings.enabled`` false every method does nothing.

    ``group`` ties the stages of one run folder together (tag ``group``). Used by the driver only.
    """

    def __init__(
        self, settings: Tracking, run_dir: Path, group: str, note: Callable[[str, str], None] = lambda kind, text: None
    ) -> None:
        self._settings, self._run_dir, self._group = settings, run_dir, group
        self.uri = tracking_uri(settings.uri, run_dir)
        self._outbox: Outbox | None = None
        self._run: _Run | None = None
        self._sampler: Sampler | None = None
        if settings.enabled:
            quiet_mlflow()
            self._outbox = Outbox(note)
            self._outbox.start()
            # The tables of a new sqlite store take seconds: begun now, while the models are loaded.
            store = Store(self.uri, settings.experiment, run_dir)
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
        self._run = run = _Run(self._store, self._run_dir, stage, f"{self._group}/{stage}", wanted, flatten(params))
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
            run, copy = self._run, {_key(k): float(v) for k, v in metrics.items()}
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
            run, wanted = self._run, {_key(name)[:250]: value[:_LONGEST_TAG] for name, value in tags.items()}
            self._outbox.put(f"tags of {run.name}", lambda: run.tag(wanted))

    def dataset(self, data: Data) -> None:
        """Note that the run read this data (nothing is copied)."""
        if self._outbox is not None and self._run is not None:
            run = self._run
            self._outbox.put(f"dataset {data.name}", lambda: run.dataset(data))

    def finish(self, status: Status, patience: float = DRAIN_SECONDS) -> bool:
        """End the stage's run and wait a little for what is still to be stored; whether it is."""
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
        return sent

    def _system(self, run: _Run, metrics: Mapping[str, float]) -> None:
        """Called by the sampler's thread. MLflow's own monitor gives up for good at the first call that fails; this
        waits in the queue."""
        assert self._outbox is not None
        when = int(1000 * time.time())
        self._outbox.put("system metrics", lambda: run.system(metrics, when))

    def close(self) -> None:
        """Let the thread end; ``finish`` first."""
        if self._outbox is not None:
            self._outbox.close()


def keep(
    result: Mapping[str, Any],
    run_dir: Path,
    settings: Tracking,
    *,
    folder: str,
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    tags: Mapping[str, str] = MappingProxyType({}),
    files: Sequence[Path] = (),
) -> Path:
    """Write ``run_dir/<folder>/<name>-<n>.json``; when the run is tracked also to the MLflow run ``<folder>_<name>``,
    each as a step.

    Args:
        files: more artifacts of that run.
    """
    place = run_dir / folder
    place.mkdir(exist_ok=True)
    number = len(list(place.glob(f"{name}-*.json"))) + 1
    path = place / f"{name}-{number}.json"
    write_atomic(path, json.dumps(result, indent=1).encode())
    tracker = Tracker(settings, run_dir, group=run_dir.name)
    tracker.start(f"{folder}_{name}", params=params, tags={"algorithm": folder} | dict(tags))
    tracker.log(metrics, number)
    for file in (path, *files):
        tracker.artifact(file, folder)
    tracker.finish("FINISHED")
    tracker.close()
    return path


def attach(
    path: Path, settings: Tracking, run_dir: Path, stage: str, *, texts: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Store a copy of a file with a stage's run that is over (with the latest one, where there is none of that stage).

    Args:
        texts: more artifacts, by their names there.

    Returns:
        "" or why that was not done.
    """
    record = read_record(run_dir)
    if not settings.enabled or record is None:
        return "the run was not tracked"
    run_id = record["runs"].get(stage) or next(reversed(record["runs"].values()), None)
    uri = tracking_uri(settings.uri, run_dir)
    if run_id is None or (uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file()):
        return f"there is no such run in {without_password(uri)}"
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri=uri)
        client.log_artifact(run_id, str(path))
        for name, text in texts.items():
            client.log_text(run_id, text, name)
    except (MlflowException, OSError, SQLAlchemyError) as error:
        return f"the store did not take it: {str(error).strip().partition(chr(10))[0][:200]}"
    return ""


def quiet_mlflow() -> None:
    """Import MLflow without its telemetry, its patience and its chatter."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # MLflow alone would try for minutes; the queue does that better.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    del mlflow
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


class Store:
    """A tracking store with the experiment in it. A tracker's methods run in its outbox's thread."""

    def __init__(self, uri: str, experiment: str, run_dir: Path) -> None:
        self.uri, self.experiment, self.run_dir = uri, experiment, run_dir
        self.experiment_id = ""
        self.client: Any = None

    def open(self) -> None:
        """Connect, and find or make the experiment."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.client = MlflowClient(tracking_uri=self.uri)
        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                self.experiment_id = self.client.create_experiment(self.experiment, artifact_location=self._artifacts())
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(self.experiment)  # another run made it meanwhile
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            self.experiment_id = found.experiment_id
        self.client.set_experiment_tag(self.experiment_id, "mlflow.experimentKind", "custom_model_development")

    def _artifacts(self) -> str | None:
        """Beside a sqlite file; beside the run folders with another database. MLflow's own choice would be the working
        folder.

        A server knows its place.
        """
        if self.uri.startswith(("http://", "https://", "databricks")):
            return None
        sqlite = self.uri.startswith("sqlite:///")
        folder = (Path(self.uri.removeprefix("sqlite:///")) if sqlite else self.run_dir.resolve()).parent
        return (folder / "mlartifacts" / _key(self.experiment).replace("/", "_")).as_uri()


class _Run:
    """One stage's run. Methods run in the outbox's thread; when ``begin`` was of no use, so are the others, and they do
    nothing."""

    def __init__(
        self, store: Store, run_dir: Path, stage: str, name: str, tags: Mapping[str, str], params: Mapping[str, str]
    ) -> None:
        self._store, self._run_dir, self._stage, self.name = store, run_dir, stage, name
        self._tags, self._params = tags, params
        self.id = ""
        self.waiting: deque[tuple[Mapping[str, float], int, int]] = deque()
        """Metrics, step and time in milliseconds of what is not stored yet; each has a ``send`` in the queue."""
        self._continued = False
        self._logged: dict[str, int] = {}
        """The last step of each metric that was stored before this start of the stage."""
        self._samples: int | None = None

    def begin(self) -> None:
        """Continue the recorded run if the store has it, else make one and record it."""
        if not self._store.experiment_id:
            self._store.open()
        record = read_record(self._run_dir) or {}
        if record.get("tracking_uri") != without_password(self._store.uri):
            record = {}  # ids of another store mean nothing here
        known = record.get("runs", {}).get(self._stage)
        if known and self._continue(known):
            return
        if not self.id:
            made = self._store.client.create_run(self._store.experiment_id, run_name=self.name, tags=dict(self._tags))
            self.id = made.info.run_id
        runs = record.get("runs", {}) | {self._stage: self.id}
        about = {
            "tracking_uri": without_password(self._store.uri),
            "experiment_id": self._store.experiment_id,
            "runs": runs,
        }
        manifest.put_json(self._run_dir, MLFLOW, about)

    def _continue(self, run_id: str) -> bool:
        """Whether the run is there; marks it as running and finds out up to where its curves go."""
        from mlflow.exceptions import MlflowException

        client = self._store.client
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        if run.info.lifecycle_stage != "active":
            return False
        client.update_run(run_id, status="RUNNING")
        # A step that was stored before the crash and is computed again must not be in the curve twice.
        self._logged = {key: max(m.step for m in client.get_metric_history(run_id, key)) for key in run.data.metrics}
        self.id, self._continued = run_id, True
        return True

    def log_params(self) -> None:
        """Store the parameters of a new run; those of an old one cannot change."""
        from mlflow.entities import Param

        if not self.id or self._continued:
            return
        params = [Param(_key(key)[:250], value[:_LONGEST_PARAM]) for key, value in self._params.items()]
        for first in range(0, len(params), _PARAMS_AT_ONCE):
            self._store.client.log_batch(self.id, params=params[first : first + _PARAMS_AT_ONCE])

    def send(self) -> None:
        """Store what is waiting and not there yet, as many steps as fit into one call."""
        from mlflow.entities import Metric

        new: list[Any] = []
        steps = 0
        for metrics, step, when in list(self.waiting):
            more = [
                Metric(key, value, when, step) for key, value in metrics.items() if step > self._logged.get(key, -1)
            ]
            if new and len(new) + len(more) > _METRICS_AT_ONCE:
                break
            new += more
            steps += 1
        for first in range(0, len(new) if self.id else 0, _METRICS_AT_ONCE):
            self._store.client.log_batch(self.id, metrics=new[first : first + _METRICS_AT_ONCE])
        # Only now: what the store did not take stays.
        for _ in range(steps):
            self.waiting.popleft()

    def artifact(self, path: Path, folder: str | None) -> None:
        """Store a copy of a file, or of all files in a folder."""
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        if self.id:
            log = self._store.client.log_artifacts if path.is_dir() else self._store.client.log_artifact
            log(self.id, str(path), folder)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags; those of an earlier start are replaced."""
        from mlflow.entities import RunTag

        if self.id:
            self._store.client.log_batch(self.id, tags=[RunTag(name, value) for name, value in tags.items()])

    def dataset(self, data: Data) -> None:
        """Note an input with its digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if self.id:
            known = Dataset(data.name[:500], data.digest()[:_DIGEST], source_type=data.kind, source=data.source)
            tags = [InputTag("mlflow.data.context", data.context)]
            self._store.client.log_inputs(self.id, datasets=[DatasetInput(known, tags)])

    def system(self, metrics: Mapping[str, float], when: int) -> None:
        """Store a sample of the machine under the next step of its own count, which goes on where an earlier start
        ended."""
        from mlflow.entities import Metric

        if not self.id:
            return
        if self._samples is None:
            self._samples = 1 + max((step for key, step in self._logged.items() if key.startswith(SYSTEM)), default=-1)
        self._store.client.log_batch(
            self.id, metrics=[Metric(SYSTEM + key, v, when, self._samples) for key, v in metrics.items()]
        )
        self._samples += 1  # only now: tried again, it is the same step

    def end(self, status: str, when: int) -> None:
        """Close the run."""
        if self.id:
            self._store.client.set_terminated(self.id, status=status, end_time=when)
