"""Versions, machine and commit of a run, written into its folder at each start so that it can be reproduced."""

from __future__ import annotations

import logging
import os
import platform
import resource
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from pipeline.runs import manifest
from pipeline.runs.layout import (
    ENVIRONMENT,
)

PACKAGES = (
    "latent-control",
    "torch",
    "transformers",
    "ray",
    "mlflow",
    "safetensors",
    "pyarrow",
    "numpy",
    "accelerate",
    "tokenizers",
    "vllm",
)
_CPU = "model name"


def environment() -> dict[str, Any]:
    """``{"git_commit", "python", "system", "host", "cpu", "cpus", "memory_gib", "gpus", "packages": {name: version}}``
    of this process."""
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "host": platform.node(),
        "cpu": _cpu(),
        "cpus": os.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def write_environment(run_dir: Path) -> None:
    """Of the latest start: a run that is resumed elsewhere says where it ended."""
    manifest.put_json(run_dir, ENVIRONMENT, environment())


def peak_gib() -> float:
    """The most memory that this process has held so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(_CPU)]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import torch

    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


def git_commit() -> str:
    """The commit this code was run from, ``-dirty`` when changed since; empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, env=environment
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def calm_libraries() -> None:
    """Keep progress bars and upgrade advice of libraries out of the run's own lines."""
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()
    logging.getLogger("ray.rllib.algorithms.algorithm_config").setLevel(logging.ERROR)
