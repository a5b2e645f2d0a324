"""CPUs and GPUs that a config requests, against those of this machine or of a cluster's nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from configs.checks import offline_sections
from configs.schema import RunConfig
from configs.task_options import reward_actors

MOST_NODES = 1000
"""Of a cluster that a config is given files for."""


def local_problems(config: RunConfig) -> Iterator[str]:
    """Requested CPUs and GPUs that this machine lacks; only when Ray runs here."""
    if config.cluster.address != "local":
        return
    yield from _asked("GPU", gpus_here(), _gpus(config), "this machine has", "or set cluster.address")
    yield from _asked("CPU", cpus_here(), _cpus(config), "this machine has", "or set cluster.address")


def cluster_problems(config: RunConfig, nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """Requested resources that a cluster's nodes lack, e.g. ``[{"CPU": 8, "GPU": 1}]``: in total, and of each actor on
    one node."""
    there = f"the cluster's {len(nodes)} nodes have"
    problems = [
        message
        for kind, wanted in (("GPU", _gpus(config)), ("CPU", _cpus(config)))
        for message in _asked(kind, sum(node.get(kind, 0) for node in nodes), wanted, there, "or add nodes")
    ]
    for name, needs in _actors(config):
        if not any(all(node.get(kind, 0) >= amount for kind, amount in needs.items()) for node in nodes):
            one = " and ".join(f"{amount:g} {kind}s" for kind, amount in needs.items() if amount)
            largest = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
            has = f"{largest.get('CPU', 0):g} CPUs and {largest.get('GPU', 0):g} GPUs"
            problems.append(
                f"{name}: each needs {one} on one node, but no node has that (the largest: {has}); ask "
                "for less for each"
            )
    return problems


def nodes_needed(config: RunConfig, node: Mapping[str, float], head: Mapping[str, float]) -> int:
    """How many nodes a config needs, ``head`` among them and the others like ``node``.

    Raises:
        ValueError: with what even ``MOST_NODES`` lack.
    """
    problems: list[str] = []
    for count in range(1, MOST_NODES + 1):
        problems = cluster_problems(config, [head, *[node] * (count - 1)])
        if not problems:
            return count
    raise ValueError("; ".join([*problems, "or give larger nodes (--node-cpus, --node-gpus)"]))


def _asked(kind: str, there: float, wanted: dict[str, float], who: str, remedy: str) -> Iterator[str]:
    total = sum(wanted.values())
    if total > there:
        terms = " + ".join(f"{name} = {amount:g}" for name, amount in wanted.items() if amount)
        biggest = max(wanted, key=lambda name: wanted[name])
        place = biggest.split(" x ")[0]
        yield f"{place}: {total:g} {kind}s asked for ({terms}), but {who} {there:g}; ask for less, {remedy}"


def _actors(config: RunConfig) -> Iterator[tuple[str, dict[str, float]]]:
    """Resources of a single actor of each kind."""
    rollout, cluster = config.rollout, config.cluster
    if config.improve is not None or config.evaluation is not None:
        yield (
            "rollout.cpus_per_worker, rollout.gpus_per_worker",
            {"CPU": rollout.cpus_per_worker, "GPU": rollout.gpus_per_worker},
        )
    if config.improve is not None and cluster.num_learners:
        yield (
            "cluster.cpus_per_learner, cluster.gpus_per_learner",
            {"CPU": cluster.cpus_per_learner, "GPU": cluster.gpus_per_learner},
        )
    for name, section in offline_sections(config):
        if section.num_workers > 1:
            yield f"{name}.gpus_per_worker", {"CPU": 1.0, "GPU": float(section.gpus_per_worker)}


def _gpus(config: RunConfig) -> dict[str, float]:
    offline = {
        f"{name}.num_workers x {name}.gpus_per_worker": float(s.num_workers * s.gpus_per_worker)
        for name, s in offline_sections(config)
    }
    if config.improve is None:
        return _largest(offline)
    rollout, cluster = config.rollout, config.cluster
    wanted = {
        "rollout.num_workers x rollout.gpus_per_worker": rollout.num_workers * rollout.gpus_per_worker,
        "cluster.num_learners x cluster.gpus_per_learner": max(1, cluster.num_learners) * cluster.gpus_per_learner,
        "task.options.preference actors x gpus_per_actor": reward_actors(config.task.model_dump(), "gpus_per_actor"),
    }
    # Stages run one after the other: the larger of the two demands counts.
    return max(wanted, _largest(offline), key=lambda demand: sum(demand.values()))


def _largest(demand: dict[str, float]) -> dict[str, float]:
    name = max(demand, key=lambda key: demand[key], default=None)
    return {} if name is None else {name: demand[name]}


def _cpus(config: RunConfig) -> dict[str, float]:
    if config.improve is None and config.evaluation is None:
        return {}
    # The driver asks Ray for none: with the learner in it, the workers may use all CPUs.
    learners = config.cluster.num_learners * config.cluster.cpus_per_learner
    workers = config.rollout.num_workers * config.rollout.cpus_per_worker
    return {
        "rollout.num_workers x rollout.cpus_per_worker": workers,
        "cluster.num_learners x cluster.cpus_per_learner": learners,
        "task.options.preference actors x cpus_per_actor": reward_actors(config.task.model_dump(), "cpus_per_actor"),
    }


def cpus_here() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus_here() -> int:
    """GPUs torch can see."""
    import torch

    return torch.cuda.device_count()
