"""RLlib's private members that this project reads, in one place: what an update of Ray may break."""

from __future__ import annotations

from typing import Any


def actors_of(group: Any) -> Any:
    """The ``FaultTolerantActorManager`` of an ``EnvRunnerGroup`` or ``LearnerGroup``."""
    return group._worker_manager


def new_worker(group: Any, number: int) -> Any:
    """A worker made as those of an ``EnvRunnerGroup``, and not in it: ``add_workers`` adds one before it is up, and
    gives it the number of one that has gone."""
    return group._make_worker(
        env_creator=group._env_creator,
        validate_env=None,
        worker_index=number,
        num_workers=number,
        config=group._remote_config_obj_ref,
    )


def resources_of(group: Any) -> dict[str, float]:
    """``num_cpus`` and ``num_gpus`` of each worker of an ``EnvRunnerGroup``."""
    found: dict[str, float] = group._remote_args
    return found
