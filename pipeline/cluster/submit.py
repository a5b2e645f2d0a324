"""Submits jobs to a Ray cluster: staged files, reasons for waiting, logs, exit code."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_actors, list_nodes
from ray.util.state.exception import RayStateApiException

from configs.loading import dump_config
from configs.paths import path_fields
from configs.redaction import public_environment
from configs.schema import RunConfig
from pipeline.cluster.connect import DRIVER_ENVIRONMENT
from pipeline.runs.errors import first_line
from pipeline.storage.atomic import copy

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "latent_control", "rollout_workers", "learners", "pipeline")
CONFIG = "job.yaml"
LARGEST = 100 * 2**20
"""Bytes that Ray takes as a job's working directory."""
LOOK_EVERY = 5.0
"""Seconds between two looks at why a job waits."""
STOP_SECONDS = 60
"""Seconds that a stopped driver has to end its MLflow run and its workers before it is killed."""
INTERRUPTED = 130
KILLED = 130
"""Exit codes above are those of a shell whose command a signal ended; a run's own end with 130 (docs/cluster.md)."""
REST = 5.0
"""Seconds before a job whose driver was lost is submitted again; they double each time."""

# SIGINT ends the driver as Ctrl-C does: its MLflow run is KILLED, and the log says how to resume.
JOB_ENVIRONMENT = DRIVER_ENVIRONMENT | {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}


@contextmanager
def at(address: str) -> Iterator[JobSubmissionClient]:
    """A client of the job server at ``address``, regardless of the environment (Ray gives its variables precedence).

    Raises:
        ValueError: no server answers there, or it asks for a token that this shell does not have.
    """
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        try:
            client = JobSubmissionClient(address)
        except (OSError, RuntimeError, RayError) as error:
            raise ValueError(
                f"--address: {address}: {first_line(error)}; give the head's dashboard, e.g. http://HEAD:8265, "
                "and RAY_AUTH_MODE and its token as on the head"
            ) from error
        yield client
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def node_resources(address: str) -> list[dict[str, float]]:
    """Total resources of each living node."""
    return [
        node.resources_total
        for node in list_nodes(address=address, detail=True, limit=10_000, raise_on_missing_output=False)
        if node.state == "ALIVE"
    ]


@contextmanager
def staged(config: RunConfig) -> Iterator[Path]:
    """A folder with all that the nodes need besides their environment: the packages, the config, and files inside the
    packages that it names.

    Raises:
        ValueError: it is more than Ray takes.
    """
    with TemporaryDirectory(prefix="latent-control-job-") as name:
        folder = Path(name)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "models"))
        data = config.model_dump(mode="json")
        for _, value, put in path_fields(data):
            path = Path(value)
            if path.is_absolute() and path.exists() and path.is_relative_to(ROOT / "configs"):
                inside = path.relative_to(ROOT)
                copy(path, folder / inside)
                put(f"./{inside}")
        (folder / CONFIG).write_text(dump_config(RunConfig.model_validate_json(json.dumps(data), strict=True)))
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > LARGEST:
            raise ValueError(
                f"the job would bring {size >> 20} MiB, Ray takes {LARGEST >> 20} MiB: put models on the shared storage"
            )
        yield folder


def sent() -> dict[str, str]:
    """This shell's variables for MLflow, which the driver needs, without those that hold secrets: all who reach the
    dashboard can read what a job is sent with."""
    return {name: value for name, value in public_environment().items() if name.startswith("MLFLOW_")}


def not_sent() -> list[str]:
    """What is to be said of the others."""
    names = [name for name in os.environ if name.startswith("MLFLOW_") and name not in sent()]
    if not names:
        return []
    return [
        f"{', '.join(sorted(names))}: not sent with the job, whose variables all who reach the dashboard can read; set "
        "them where the nodes start Ray"
    ]


def submit(client: JobSubmissionClient, folder: Path, run_dir: Path) -> str:
    """Start the staged job; returns its submission id."""
    entrypoint = shlex.join(["python", "-m", "pipeline", "job", CONFIG, "--run-dir", str(run_dir)])
    submission_id: str = client.submit_job(
        entrypoint=f"exec {entrypoint}",  # the signal of a stop is for the driver, not for a shell around it
        runtime_env={"working_dir": str(folder), "env_vars": JOB_ENVIRONMENT | sent()},
        metadata={"run_dir": str(run_dir)},
    )
    return submission_id


def follow(
    client: JobSubmissionClient, job: str, address: str, out: Callable[[str], None], say: Callable[[str], None]
) -> int:
    """Pass a job's log to ``out`` and the reasons why it waits to ``say`` until it ends; returns its exit code. Ctrl-C
    stops the job."""
    try:
        asyncio.run(_follow(client, job, address, out, say))
    except KeyboardInterrupt:
        say(f"stopping {job} and its actors")
        client.stop_job(job)
        asyncio.run(_ended(client, job))
        return INTERRUPTED
    return exit_code(client.get_job_info(job), say)


def exit_code(info: JobDetails, say: Callable[[str], None]) -> int:
    """The driver's exit code; says why where there is none."""
    if info.status == JobStatus.STOPPED:
        say("the job was stopped")
        return INTERRUPTED
    if info.driver_exit_code is None and info.status != JobStatus.SUCCEEDED:
        say(f"the job failed before its driver ran: {info.message}")
    return info.driver_exit_code if info.driver_exit_code is not None else int(info.status != JobStatus.SUCCEEDED)


def driver_lost(info: JobDetails) -> bool:
    """Whether a job's driver was killed, or lost with its node, rather than ended by its own error."""
    code = info.driver_exit_code
    return info.status == JobStatus.FAILED and (code is None or code < 0 or code > KILLED)


async def _follow(
    client: JobSubmissionClient, job: str, address: str, out: Callable[[str], None], say: Callable[[str], None]
) -> None:
    reasons = asyncio.create_task(_reasons(client, job, address, say))
    seen = 0
    while True:
        position = 0
        try:
            async for text in client.tail_job_logs(job):
                fresh = text[max(0, seen - position) :]
                position += len(text)
                if fresh:
                    seen = position
                    out(fresh)
        except (RuntimeError, aiohttp.ClientError) as error:
            say(f"the log broke off ({first_line(error)}), asking again")
        if client.get_job_status(job).is_terminal():
            break
        await asyncio.sleep(1.0)  # the connection was cut: a new one begins at the log's first line
    reasons.cancel()


async def _ended(client: JobSubmissionClient, job: str) -> None:
    for _ in range(2 * STOP_SECONDS):
        if client.get_job_status(job).is_terminal():
            return
        await asyncio.sleep(1.0)
    raise TimeoutError(f"{job} has not ended within {2 * STOP_SECONDS} s of being asked to")


async def _reasons(client: JobSubmissionClient, job: str, address: str, say: Callable[[str], None]) -> None:
    said = ""
    while True:
        await asyncio.sleep(LOOK_EVERY)
        # a failed poll is ignored; the next may succeed
        with suppress(RuntimeError, RayStateApiException, OSError):
            reason = await asyncio.to_thread(_look, client, job, address)
            if reason and reason != said:
                say(reason)
            said = reason


def _look(client: JobSubmissionClient, job: str, address: str) -> str:
    info = client.get_job_info(job)
    if info.status == JobStatus.PENDING:
        return f"pending: {info.message}"
    if info.job_id is None:
        return ""
    waiting = [
        actor
        for state in ("PENDING_CREATION", "RESTARTING")
        for actor in list_actors(
            address=address, filters=[("job_id", "=", info.job_id), ("state", "=", state)], detail=True
        )
    ]
    return waiting_reason(
        [(a.class_name, a.required_resources or {}) for a in waiting], node_resources(address), _used(client)
    )


def _used(client: JobSubmissionClient) -> dict[str, float]:
    """Resources of the whole cluster in use, as its autoscaler's report counts them."""
    answer = client._do_request("GET", "/api/cluster_status").json()
    usage = (((answer.get("data") or {}).get("clusterStatus") or {}).get("loadMetricsReport") or {}).get("usage") or {}
    return {kind: float(used) for kind, (used, _) in usage.items()}


def waiting_reason(
    actors: Sequence[tuple[str, Mapping[str, float]]], nodes: Sequence[Mapping[str, float]], used: Mapping[str, float]
) -> str:
    """Why these (class, resources) have not started: ``""`` when there are none.

    ``waiting_reason([("LMEnvRunner", {"CPU": 1})], [{"CPU": 2}], {"CPU": 2})`` is
    ``"waiting: 1 LMEnvRunner (1 CPU each); in use: 2 of 2 CPU"``.
    """
    if not actors:
        return ""
    wanted = Counter(
        (name, " + ".join(f"{amount:g} {kind}" for kind, amount in sorted(needs.items()) if amount) or "nothing")
        for name, needs in actors
    )
    total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    state = ", ".join(
        f"{used.get(kind, 0):g} of {amount:g} {kind}" if used else f"{amount:g} {kind}"
        for kind, amount in total.items()
        if amount
    )
    waiting = ", ".join(f"{count} {name} ({each} each)" for (name, each), count in wanted.items())
    return f"waiting: {waiting}; {'in use' if used else 'in all'}: {state}"
