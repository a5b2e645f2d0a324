"""Ray: joining the job's cluster, or starting a private one on this machine."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from configs.schema import RunConfig
from configs.task_options import reward_actors

# Workers import the packages from here when they are not installed; several threads per actor would fight for the cores.
WORKER_ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "RAY_ENABLE_AUTO_CONNECT": "0", "OMP_NUM_THREADS": "1"}
DRIVER_ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # it warns that RLlib keeps its config in the object store, which the driver owns
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own boxes and tables, which its verbose=0 leaves on
}
NODE_SECONDS = 120.0
"""How long a node may take to say whether it sees the run folder."""


def cpus_wanted(config: RunConfig) -> float:
    """CPUs that the actors of a run reserve at the same time."""
    learners = config.cluster.num_learners * config.cluster.cpus_per_learner
    offline = max(
        (s.num_workers for s in (config.actions, config.clone, config.finetune) if s is not None and s.num_workers > 1), default=0
    )
    judges = reward_actors(config.task.model_dump(), "cpus_per_actor")
    return max(config.rollout.num_workers * config.rollout.cpus_per_worker + learners + judges, offline + 1 if offline else 0)


def require_shared(folder: Path) -> None:
    """``ValueError`` unless every node of the cluster sees ``folder`` as this process does; Ray must be connected.

    Stages on other nodes read checkpoints from the run folder: where they see another disk, a run would fail hours later.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    word = uuid.uuid4().hex
    probe = folder / f".seen-by-all-{word}"
    probe.write_text(word)

    @ray.remote(num_cpus=0)
    def read(path: str) -> str:
        try:
            return Path(path).read_text()
        except OSError as error:
            return str(error)

    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        asked = [
            read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote(str(probe)) for n in nodes
        ]
        found = dict(zip((n["NodeManagerAddress"] for n in nodes), ray.get(asked, timeout=NODE_SECONDS), strict=True))
    finally:
        probe.unlink()
    if blind := sorted(node for node, text in found.items() if text != word):
        raise ValueError(
            f"{folder} is not seen by the nodes {', '.join(blind)}: give a --run-dir on storage that all nodes share ({found[blind[0]]})"
        )


@contextmanager
def connected(config: RunConfig) -> Iterator[None]:
    """Ray for the length of a block; a Ray that was there before is used and left running.

    A private Ray gets at least the CPUs the config asks for, since on one machine they only bound how many actors start.
    """
    with joined(config.cluster.address, cpus_wanted(config)):
        yield


@contextmanager
def joined(address: str, cpus_wanted: float) -> Iterator[None]:
    """As ``connected``, for an address and so many CPUs."""
    if ray.is_initialized():
        yield
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in DRIVER_ENVIRONMENT.items()})
    local = address == "local"
    cpus = max(os.cpu_count() or 1, int(cpus_wanted + 0.999)) if local else None
    ray.init(
        address=address,
        num_cpus=cpus,
        include_dashboard=False if local else None,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
        logging_level="ERROR",
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()
