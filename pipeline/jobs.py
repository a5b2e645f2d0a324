"""A run as a Ray job: checked here, fitted to the cluster's nodes, sent with everything it needs, followed to its exit code.

Nothing is built on the nodes: they need the same Python packages, not this project. What travels is a folder of a few MiB with the
packages, the resolved config and the embedded base LM; data and other models must lie on storage that every node sees.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.loading import dump_config
from configs.schema import RunConfig
from pipeline.cluster import DRIVER_ENVIRONMENT

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("configs", "latent_control", "learners", "pipeline", "rollout_workers")
SUBMITTED = "configs/submitted.yaml"
POLL_SECONDS, STOP_SECONDS = 1.0, 30.0
Resources = Mapping[str, float]
"""E.g. ``{"CPU": 1.0, "GPU": 0.5}``."""


def bundles(config: RunConfig) -> dict[str, tuple[int, Resources]]:
    """What the stage that wants most reserves at once: ``{"rollout worker": (8, {"CPU": 1, "GPU": 0.5}), "learner": (2, {...})}``."""
    rollout, cluster = config.rollout, config.cluster
    wanted: dict[str, tuple[int, Resources]] = {}
    if config.improve is not None or config.evaluation is not None:
        wanted["rollout worker"] = (rollout.num_workers, {"CPU": rollout.cpus_per_worker, "GPU": rollout.gpus_per_worker})
    if config.improve is not None and cluster.num_learners:
        wanted["learner"] = (cluster.num_learners, {"CPU": cluster.cpus_per_learner, "GPU": cluster.gpus_per_learner})
    return wanted


def misfits(nodes: Sequence[Resources], wanted: Mapping[str, tuple[int, Resources]]) -> list[str]:
    """Why ``wanted`` cannot all be placed on ``nodes``: an actor that fits none, or more in all than there is."""
    problems = []
    for name, (count, each) in wanted.items():
        kinds = {kind: amount for kind, amount in each.items() if amount}
        if count and not any(all(node.get(kind, 0.0) >= amount for kind, amount in kinds.items()) for node in nodes):
            largest = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in kinds}
            problems.append(f"a {name} needs {_shown(kinds)} on one node, but the nodes have at most {_shown(largest)}")
    for kind in ("CPU", "GPU"):
        total = sum(count * each.get(kind, 0.0) for count, each in wanted.values())
        there = sum(node.get(kind, 0.0) for node in nodes)
        if total > there:
            terms = " + ".join(f"{count} {name}s x {each[kind]:g}" for name, (count, each) in wanted.items() if each.get(kind))
            problems.append(f"{total:g} {kind}s are needed ({terms}), the cluster has {there:g}: ask for fewer, or add nodes")
    return problems


def _shown(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


def nodes_of(address: str) -> list[dict[str, float]]:
    """Total resources of each living node of the cluster whose dashboard is at ``address``.

    Raises:
        ValueError: nobody answers there.
    """
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        found = list_nodes(address=address, limit=10_000, raise_on_missing_output=False)
    except (RayStateApiException, OSError) as error:
        raise ValueError(_unreachable(address, error)) from error
    alive = [node.resources_total for node in found if node.state == "ALIVE"]
    return [{kind: float(amount) for kind, amount in total.items() if kind in ("CPU", "GPU")} for total in alive]


def client_of(address: str) -> JobSubmissionClient:
    """Ray's client for jobs; ``ValueError`` when nobody answers at ``address``."""
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(_unreachable(address, error)) from error


def _unreachable(address: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0][:200]
    remedy = "give the address of the cluster's dashboard, e.g. http://HEAD:8265 (with RAY_AUTH_MODE=token where it asks for one)"
    return f"--address {address}: {reason}; {remedy}"


def stage(config: RunConfig, folder: Path) -> None:
    """Put packages, embedded models and the resolved config into ``folder``; a base LM inside ``configs`` travels along."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    base, home = Path(config.base.model), ROOT / "configs"
    sent = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "auto"})})
    if base.is_absolute() and base.is_relative_to(home):
        sent = sent.model_copy(update={"base": sent.base.model_copy(update={"model": str(base.relative_to(home))})})
    (folder / SUBMITTED).write_text(dump_config(sent), encoding="utf-8")


def submit(client: JobSubmissionClient, config: RunConfig, run_dir: Path) -> str:
    """Send the run; returns the job's id. The driver continues a run that ``run_dir`` holds already."""
    # What makes workers find the packages is the working directory; ray.init adds the rest.
    environment = {name: value for name, value in DRIVER_ENVIRONMENT.items() if name != "RAY_ENABLE_AUTO_CONNECT"}
    with tempfile.TemporaryDirectory() as staging:
        stage(config, Path(staging))
        return client.submit_job(
            entrypoint=f"python -m pipeline job {SUBMITTED} --run-dir {shlex.quote(str(run_dir))}",
            runtime_env={"working_dir": staging, "env_vars": environment},
            metadata={"run_dir": str(run_dir), "project": "latent-control"},
        )


def follow(client: JobSubmissionClient, job: str, say: Callable[[str], None]) -> int:
    """The job's log as it is written, why it waits while it does, and its exit code at the end."""
    from ray.job_submission import JobStatus

    told = ""
    while (info := client.get_job_info(job)).status == JobStatus.PENDING:
        if info.message and info.message != told:
            told = info.message
            say(f"{job} waits: {told}")
        time.sleep(POLL_SECONDS)
    asyncio.run(_tail(client, job, say))
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(POLL_SECONDS)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    say(f"{job} {str(info.status).lower()}: {(info.message or '').strip().splitlines()[0] if info.message else 'no reason given'}")
    return info.driver_exit_code or 1


async def _tail(client: JobSubmissionClient, job: str, say: Callable[[str], None]) -> None:
    async for text in client.tail_job_logs(job):
        say(text.rstrip("\n"))


def stop(client: JobSubmissionClient, job: str) -> bool:
    """Stop a job and its actors; whether it has ended in time."""
    client.stop_job(job)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if client.get_job_status(job).is_terminal():
            return True
        time.sleep(POLL_SECONDS)
    return False
