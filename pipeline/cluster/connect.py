"""Ray: joining the job's cluster, or starting a private one on this machine."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from configs.schema import RunConfig
from configs.task_options import reward_actors
from pipeline.cluster.ray_token import has_token
from pipeline.runs import interrupts
from pipeline.runs.errors import RunError, first_line

# Workers import the packages from here when they are not installed; several threads per actor would fight for the
# cores.
WORKER_ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # for learners of several threads; see pipeline/__init__.py
}
DRIVER_ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # it warns that RLlib keeps its config in the object store, which the driver owns
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own boxes and tables, which its verbose=0 leaves on
    "RAY_prestart_worker_first_driver": "0",  # a process per CPU that WORKER_ENVIRONMENT keeps our actors from using
}
STARTS, SLOW = 5, "timed out during startup"
"""Attempts to start a private Ray, and what Ray says of one that was too slow."""


def cpus_wanted(config: RunConfig) -> float:
    """CPUs that the actors of a run reserve at the same time."""
    learners = config.cluster.num_learners * config.cluster.cpus_per_learner
    offline = max(
        (s.num_workers for s in (config.actions, config.clone, config.finetune) if s is not None and s.num_workers > 1),
        default=0,
    )
    judges = reward_actors(config.task.model_dump(), "cpus_per_actor")
    return max(config.most_workers * config.rollout.cpus_per_worker + learners + judges, offline + 1 if offline else 0)


def worker_environment() -> dict[str, str]:
    """Variables for the workers, except those that the surrounding Ray job sets already: Ray refuses duplicates."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    given = set(job.get("env_vars", ())) | ({"PYTHONPATH"} if "working_dir" in job else set())
    return {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in given}


def is_connected() -> bool:
    """Whether this process has a Ray cluster already."""
    return bool(ray.is_initialized())


@contextmanager
def connected(config: RunConfig) -> Iterator[None]:
    """Ray for the duration of a block; a running Ray is used and left running.

    A private Ray gets at least the CPUs the config asks for, since on one machine they only bound how many actors
    start.
    """
    with joined(config.cluster.address, cpus_wanted(config), config.cluster.metrics_port):
        yield


@contextmanager
def joined(address: str, cpus_wanted: float, metrics_port: int | None = None) -> Iterator[None]:
    """As ``connected``, with an address, a number of CPUs and, for a private Ray, the port of its metrics."""
    if ray.is_initialized():
        yield
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in DRIVER_ENVIRONMENT.items()})
    private: dict[str, Any] = {"num_cpus": max(os.cpu_count() or 1, math.ceil(cpus_wanted)), "include_dashboard": False}
    private |= {} if metrics_port is None else {"_metrics_export_port": metrics_port}
    if address == "local" and not has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray would keep one in a home that may not be there
    with interrupts.through_replacement():
        _start(address, private if address == "local" else {})
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def without_notice() -> Iterator[None]:
    """Ray's C++ part says on stderr that it has read RAY_BACKEND_LOG_LEVEL: that line is left out, others come
    after."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            os.write(2, b"".join(line for line in file if b"RAY_BACKEND_LOG_LEVEL" not in line))


def _start(address: str, own: dict[str, Any]) -> None:
    """``ray.init``; a private Ray that takes long on a busy machine gets more than the half minute that Ray gives it.
    No process of an attempt that failed stays: Ray leaves them, and each makes the machine busier.

    Raises:
        RunError: in one sentence.
    """
    before = set(psutil.Process().children(recursive=True))
    for attempt in range(1, STARTS + 1):
        try:
            with without_notice():
                ray.init(
                    address=address,
                    **own,
                    runtime_env={"env_vars": worker_environment()},
                    logging_level="ERROR",
                    log_to_driver=False,
                )
            return
        except Exception as error:  # what Ray raises of a slow start is no more special
            for process in set(psutil.Process().children(recursive=True)) - before:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if SLOW in str(error) and address == "local" and attempt < STARTS:
                continue
            raise RunError(
                f"Ray cannot be {'started here' if address == 'local' else f'joined at {address}'}: "
                f"{first_line(error)}; look at RAY_AUTH_MODE and its token (as on the head), RAY_TMPDIR, and what "
                "memory and processors are free"
            ) from error
