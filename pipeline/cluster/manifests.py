"""Files that start a run on a cluster: a KubeRay RayJob, a Slurm batch script. Both call ``latent-control job``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from configs.yaml_text import write
from pipeline.cluster.connect import DRIVER_ENVIRONMENT

LONGEST_NAME = 47
"""Letters of a RayJob's name; KubeRay puts its own behind it."""
VARIABLES = ("RAY_ENABLE_AUTO_CONNECT", "RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_UV_RUN_RUNTIME_ENV")
SBATCH = Template(
    """\
#!/bin/bash
#SBATCH --job-name=$name --nodes=$nodes --ntasks-per-node=1 --cpus-per-task=$cpus --mem=${memory}G$gpus --requeue
# One Ray node per Slurm node; when the batch ends, or is requeued, so do they, and the run continues.
set -euo pipefail
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_ENABLE_AUTO_CONNECT=0 RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n')
head=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | head -n1)
port=$$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$$head:$$port"
srun --nodes=1 --ntasks=1 -w "$$head" --overlap ray start --head --port="$$port" --num-cpus=$head_cpus --block &
ray_head=$$!
until ray health-check --address "$$RAY_ADDRESS" 2>/dev/null; do kill -0 "$$ray_head"; sleep 2; done
if [ "$$SLURM_NNODES" -gt 1 ]; then
    srun --nodes=$$((SLURM_NNODES - 1)) --ntasks=$$((SLURM_NNODES - 1)) --exclude="$$head" --overlap \\
        ray start --address="$$RAY_ADDRESS" --num-cpus=$cpus --block &
    sleep 15
fi
$command &
wait -n "$$ray_head" "$$!"  # the run's end, or that of Ray's head, without which it would wait for ever
"""
)


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """``ClusterPlan(name="first", nodes=3, cpus=16, head_cpus=14, gpus=1, memory=64, command=("latent-control", "job",
    "quickstart", "--run-dir", "/shared/runs/first"))``."""

    name: str
    nodes: int
    """The head among them"""
    cpus: int
    """Of each node"""
    head_cpus: int
    """That the head gives to actors; the driver keeps the others"""
    gpus: int
    """Of each node"""
    memory: int
    """GiB of each node"""
    command: Sequence[str]


def job_name(run_dir: Path) -> str:
    """A run folder's name as Kubernetes and Slurm take it: small letters, digits and dashes, a letter first."""
    plain = re.sub(r"[^a-z0-9]+", "-", run_dir.name.lower()).strip("-")
    return f"latent-control-{plain}"[:LONGEST_NAME].rstrip("-")


def sbatch(plan: ClusterPlan) -> str:
    """The batch script."""
    return SBATCH.substitute(
        name=plan.name,
        nodes=plan.nodes,
        cpus=plan.cpus,
        head_cpus=plan.head_cpus,
        memory=plan.memory,
        gpus=f" --gpus-per-node={plan.gpus}" if plan.gpus else "",
        command=shlex.join(plan.command),
    )


def rayjob(plan: ClusterPlan, image: str, claim: str, mount: Path) -> str:
    """The RayJob: ``claim``, a ReadWriteMany volume claim, is mounted at ``mount`` in each pod of ``image``.

    Fields: KubeRay's API reference of ray.io/v1 (https://ray-project.github.io/kuberay/reference/api/).
    """

    def pods() -> dict[str, Any]:  # made twice: YAML would write a reference to one that is shared
        limits = {"cpu": str(plan.cpus), "memory": f"{plan.memory}Gi"}
        limits |= {"nvidia.com/gpu": str(plan.gpus)} if plan.gpus else {}
        container = {
            "name": "ray",
            "image": image,
            "resources": {"limits": limits, "requests": dict(limits)},
            "volumeMounts": [{"name": "shared", "mountPath": str(mount)}],
        }
        volume = {"name": "shared", "persistentVolumeClaim": {"claimName": claim}}
        security = {"runAsNonRoot": True, "fsGroup": 1000}
        return {"spec": {"securityContext": security, "containers": [container], "volumes": [volume]}}

    workers = {
        "groupName": "workers",
        "replicas": plan.nodes - 1,
        "minReplicas": plan.nodes - 1,
        "maxReplicas": plan.nodes - 1,
        "rayStartParams": {},
        "template": pods(),
    }
    cluster = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": {"num-cpus": str(plan.head_cpus)}, "template": pods()},
        "workerGroupSpecs": [workers] if plan.nodes > 1 else [],
    }
    spec = {
        "entrypoint": shlex.join(plan.command),
        "runtimeEnvYAML": write({"env_vars": {name: DRIVER_ENVIRONMENT[name] for name in VARIABLES}}),
        "backoffLimit": 3,  # a restarted job continues the run
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": cluster,
    }
    return write({"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": plan.name}, "spec": spec})
