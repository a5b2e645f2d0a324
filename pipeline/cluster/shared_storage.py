"""Checks before a run starts on a cluster that its driver and all nodes see the same files, by writing and reading."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.paths import path_fields
from configs.schema import RunConfig

NODE_PATIENCE = 120.0
"""Seconds for a node to answer; its first task unpacks the job's files."""
NEEDED = ("torch", "transformers", "pyarrow", "gymnasium")
"""Packages that every node must have; a missing one would otherwise fail only when a worker starts there."""


def shared_storage_problems(config: RunConfig, run_dir: Path) -> list[str]:
    """All reasons why the nodes of the cluster we are connected to could not work on a run in ``run_dir``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    paths = [value for _, value, _ in path_fields(config.model_dump(mode="json")) if Path(value).is_absolute()]
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return [*storage_problems(run_dir, paths, nodes), *tracking_answers(config)]


def require_shared_storage(config: RunConfig, run_dir: Path) -> None:
    """``ValueError`` with ``shared_storage_problems`` if there are any."""
    if problems := shared_storage_problems(config, run_dir):
        raise ValueError("nothing was started:\n" + "\n".join(f"  - {problem}" for problem in problems))


def storage_problems(run_dir: Path, paths: Sequence[str], nodes: Mapping[str, str]) -> list[str]:
    """Each node (id -> address) that does not see a file written here to ``run_dir``, cannot write one, or lacks one of
    ``paths``."""
    probe = run_dir / f".probe-{uuid.uuid4().hex}"
    probe.write_text(probe.name)
    look = ray.remote(num_cpus=0, max_retries=0)(probe_node)
    try:
        asked = {
            node: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                str(probe), node, list(paths)
            )
            for node in nodes
        }
        found = {node: _answer(ref) for node, ref in asked.items()}
        for node, problems in found.items():
            if not problems and not _arrived(probe, node):
                problems.append(
                    f"what it writes to {run_dir} does not arrive at the driver; put --run-dir on storage "
                    "that all nodes mount"
                )
        return [f"node {nodes[node]}: {problem}" for node, problems in found.items() for problem in problems]
    finally:
        for file in run_dir.glob(f"{probe.name}*"):
            file.unlink()


def probe_node(probe: str, node: str, paths: list[str]) -> list[str]:
    """The problems of a node; runs there."""
    path, problems = Path(probe), []
    try:
        if path.read_text() != path.name:
            problems.append(f"{path} has another content")
        path.with_name(f"{path.name}-{node}").write_text(node)
    except OSError as error:
        problems.append(
            f"does not share {path.parent} with the driver ({error.strerror}); put --run-dir on storage "
            "that all nodes mount"
        )
    problems += [
        f"{missing} does not exist; put it on storage that all nodes mount"
        for missing in paths
        if not os.path.exists(missing)
    ]
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        problems.append(f"{', '.join(lacking)} not installed; all nodes need the same environment")
    return problems


def _answer(ref: Any) -> list[str]:
    try:
        found: list[str] = ray.get(ref, timeout=NODE_PATIENCE)
    except GetTimeoutError:
        return [f"has not answered for {NODE_PATIENCE:.0f} s"]
    except RayError as error:
        return [str(error).strip().rpartition("\n")[2]]
    return found


def _arrived(probe: Path, node: str) -> bool:
    answer = probe.with_name(f"{probe.name}-{node}")
    return answer.is_file() and answer.read_text() == node


def tracking_answers(config: RunConfig) -> Iterator[str]:
    """The problem if no MLflow server answers the driver, the only process that logs; MLflow itself opens a file or a
    database."""
    uri = config.tracking.uri
    if not config.tracking.enabled or uri is None or not uri.startswith(("http://", "https://")):
        return
    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return
    except HTTPError:
        return  # somebody is there, e.g. behind a login
    except OSError as error:
        yield (
            f"tracking.uri: {uri} does not answer the driver ({error}); start the server, or set tracking.enabled: "
            "false"
        )
