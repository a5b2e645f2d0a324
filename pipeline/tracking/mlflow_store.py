"""Reads and writes the MLflow store: its experiment, and one run per stage."""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.redaction import without_secrets
from pipeline.runs import manifest
from pipeline.runs.layout import CONFIG, MLFLOW
from pipeline.tracking.uris import read_record

_LONGEST_KEY, _LONGEST_PARAM = 250, 6000
_PARAMS_AT_ONCE, _METRICS_AT_ONCE = 100, 1000
_DIGEST = 32  # MLflow takes up to 36 characters
SYSTEM = "system/"
"""MLflow's interface shows metrics with this prefix in a separate tab."""


def valid_key(name: str) -> str:
    """``name`` with the characters that MLflow refuses in keys replaced."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data that a run reads: ``Data(name="countdown/train", digest=lambda: "5f0c...", kind="code", source='{"task":
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


def quiet_mlflow() -> None:
    """Import MLflow without telemetry, long retries and log output."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # MLflow alone would try for minutes; the queue does that better.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    del mlflow
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def login_problem(error: BaseException) -> str:
    """What to do where a server refuses the login, by the error of MLflow's client; "" for other errors."""
    refused = getattr(error, "error_code", "") in ("UNAUTHENTICATED", "PERMISSION_DENIED")
    if not refused and not re.search(r"error code 40[13]\b", str(error)):
        return ""
    return (
        "the MLflow server refuses the login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
        "MLFLOW_TRACKING_TOKEN, in the shell that starts this"
    )


def experiments(uri: str) -> dict[str, str]:
    """{id: name} of the newest experiments of a store.

    Raises:
        ValueError: it does not answer, or refuses the login; with the remedy.
    """
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        found = MlflowClient(tracking_uri=uri).search_experiments(max_results=20)
    except (MlflowException, OSError, SQLAlchemyError) as error:
        words = login_problem(error) or (
            f"no MLflow server answers at {without_secrets(uri)}: "
            f"{without_secrets(str(error)).partition(chr(10))[0][:300]}"
        )
        raise ValueError(words) from error
    return {experiment.experiment_id: experiment.name for experiment in found}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a store has of a run: ``Stored(deleted=False, params={"seed": "0"}, metrics=[("reward", 1, 0.5)])``."""

    deleted: bool
    params: dict[str, str]
    metrics: list[tuple[str, int, float]]
    """(key, step, value); samples of the machine are left out."""


def stored(uri: str, run_id: str) -> Stored | None:
    """What a run was sent; ``None``: the store does not answer, or never had such a run."""
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri=uri)
        run = client.get_run(run_id)
        keys = [key for key in run.data.metrics if not key.startswith(SYSTEM)]
        histories = [(key, client.get_metric_history(run_id, key)) for key in keys]
    except (MlflowException, OSError, SQLAlchemyError):
        return None
    return Stored(
        deleted=run.info.lifecycle_stage != "active",
        params=dict(run.data.params),
        metrics=[(key, metric.step, float(metric.value)) for key, history in histories for metric in history],
    )


def as_params(settings: Mapping[str, str]) -> dict[str, str]:
    """Flat settings as MLflow takes them: characters and lengths that it refuses are changed."""
    return {valid_key(key)[:_LONGEST_KEY]: value[:_LONGEST_PARAM] for key, value in settings.items()}


class MlflowStore:
    """A tracking store with the experiment in it. A tracker's methods run in its outbox's thread."""

    def __init__(self, uri: str, experiment: str, run_dir: Path) -> None:
        self.uri, self.experiment, self.run_dir = uri, experiment, run_dir
        self.experiment_id = ""
        self.stray = ""
        """Why artifacts are not stored; "" where they are."""
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
            self.stray = self._stray(found.artifact_location)
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            self.experiment_id = found.experiment_id
        self.client.set_experiment_tag(self.experiment_id, "mlflow.experimentKind", "custom_model_development")

    def _artifacts(self) -> str | None:
        """Beside a sqlite file; with another database beside the run folders. MLflow's default is the working folder.

        A server has its own default.
        """
        if self.uri.startswith(("http://", "https://", "databricks")):
            return None
        sqlite = self.uri.startswith("sqlite:///")
        folder = (Path(self.uri.removeprefix("sqlite:///")) if sqlite else self.run_dir.resolve()).parent
        return (folder / "mlartifacts" / valid_key(self.experiment).replace("/", "_")).as_uri()

    def _stray(self, location: str) -> str:
        """Of a sqlite file that was moved: its experiment goes on keeping artifacts where it was made."""
        own = self._artifacts()
        if own is None or location == own or Path(location).parts[-2:] != Path(own).parts[-2:]:
            return ""
        return (
            f"the store was moved: move it back, or set tracking.experiment to a new name; {self.experiment!r} keeps "
            f"artifacts at {location}"
        )


class MlflowRun:
    """One stage's run. Methods run in the outbox's thread; where ``begin`` failed for good, the others do
    nothing."""

    def __init__(
        self,
        store: MlflowStore,
        run_dir: Path,
        stage: str,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, str],
    ) -> None:
        self.store, self._run_dir, self._stage, self.name = store, run_dir, stage, name
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
        if not self.store.experiment_id:
            self.store.open()
        record = read_record(self._run_dir) or {}
        if record.get("tracking_uri") != without_secrets(self.store.uri):
            record = {}  # ids of another store mean nothing here
        known = record.get("runs", {}).get(self._stage)
        if known and self._continue(known):
            return
        if not self.id:
            made = self.store.client.create_run(self.store.experiment_id, run_name=self.name, tags=dict(self._tags))
            self.id = made.info.run_id
        runs = record.get("runs", {}) | {self._stage: self.id}
        about = {
            "tracking_uri": without_secrets(self.store.uri),
            "experiment_id": self.store.experiment_id,
            "runs": runs,
        }
        manifest.put_json(self._run_dir, MLFLOW, about)

    def _continue(self, run_id: str) -> bool:
        """Whether the run exists; marks it as running and reads the last step of each metric."""
        from mlflow.exceptions import MlflowException

        client = self.store.client
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
        """Store the parameters of a new run; those of a continued run cannot change."""
        from mlflow.entities import Param

        if not self.id or self._continued:
            return
        params = [Param(key, value) for key, value in as_params(self._params).items()]
        for first in range(0, len(params), _PARAMS_AT_ONCE):
            self.store.client.log_batch(self.id, params=params[first : first + _PARAMS_AT_ONCE])

    def send(self) -> None:
        """Store the waiting steps that are not stored yet, as many as fit into one call."""
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
            self.store.client.log_batch(self.id, metrics=new[first : first + _METRICS_AT_ONCE])
        # Only now: what the store did not take stays.
        for _ in range(steps):
            self.waiting.popleft()

    def artifact(self, path: Path, folder: str | None) -> None:
        """Store a copy of a file, or of all files in a folder; of a config without secrets."""
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        if self.id and self.store.stray:
            raise ValueError(self.store.stray)
        if self.id and path.name == CONFIG:
            self.store.client.log_text(self.id, without_secrets(path.read_text(encoding="utf-8")), CONFIG)
        elif self.id:
            log = self.store.client.log_artifacts if path.is_dir() else self.store.client.log_artifact
            log(self.id, str(path), folder)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags; those of an earlier start are replaced."""
        from mlflow.entities import RunTag

        if self.id:
            self.store.client.log_batch(self.id, tags=[RunTag(name, value) for name, value in tags.items()])

    def dataset(self, data: Data) -> None:
        """Note an input with its digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if self.id:
            known = Dataset(
                data.name[:500], data.digest()[:_DIGEST], source_type=data.kind, source=without_secrets(data.source)
            )
            tags = [InputTag("mlflow.data.context", data.context)]
            self.store.client.log_inputs(self.id, datasets=[DatasetInput(known, tags)])

    def system(self, metrics: Mapping[str, float], when: int) -> None:
        """Store a sample of the machine; its steps are counted separately and continue those of an earlier start."""
        from mlflow.entities import Metric

        if not self.id:
            return
        if self._samples is None:
            self._samples = 1 + max((step for key, step in self._logged.items() if key.startswith(SYSTEM)), default=-1)
        self.store.client.log_batch(
            self.id, metrics=[Metric(SYSTEM + key, v, when, self._samples) for key, v in metrics.items()]
        )
        self._samples += 1  # only now: tried again, it is the same step

    def end(self, status: str, when: int) -> None:
        """Close the run."""
        if self.id:
            self.store.client.set_terminated(self.id, status=status, end_time=when)
