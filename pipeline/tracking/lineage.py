"""Hashes of a stage's inputs and outputs: config, base LM, checkpoints, replay buffer, prompts.

They are stored in MLflow as tags and as digests of data sets, in reports and in exports: the same hash means the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema import DataSource, RunConfig
from latent_control.pretrained import CONFIG, read_config
from pipeline.runs.layout import CONFIG as RUN_CONFIG
from pipeline.runs.layout import MANIFEST, REPLAY
from pipeline.runs.stage_table import settings_of
from pipeline.storage.atomic import sha256_file, unseal
from rollout_workers.tasks import Split, Task

REPLAY_MANIFEST = "_manifest.json"
PROMPTS = 64
"""Prompts that enter a task's digest, besides their number: enough to distinguish a generator's settings. A file enters
whole."""


def config_hash(run_dir: Path) -> str:
    """SHA-256 of the resolved config."""
    path = run_dir / RUN_CONFIG
    return sha256_file(path) if path.is_file() else ""


def stage_hash(folder: Path) -> str:
    """SHA-256 of a checkpoint's manifest, which has those of all its files; empty where there is none."""
    path = folder / MANIFEST
    return sha256_file(path) if path.is_file() else ""


def base_hash(folder: Path) -> str:
    """SHA-256 of the base LM's weights, as a checkpoint of latent actions wrote it down; empty for other folders."""
    return str(read_config(folder)["base"].get("sha256", "")) if (folder / CONFIG).is_file() else ""


def replay_hash(run_dir: Path) -> str:
    """SHA-256 over the hashes of all shards in a run's replay buffer, in the order of their names; empty without one.

    Raises:
        ValueError: a manifest is damaged.
    """
    digest, shards = hashlib.sha256(), 0
    for manifest in sorted((run_dir / REPLAY).glob(f"run=*/{REPLAY_MANIFEST}")):
        for entry in unseal(manifest)["shards"]:
            digest.update(f"{manifest.parent.name}/{entry['name']}:{entry['sha256']};".encode())
            shards += 1
    return digest.hexdigest() if shards else ""


def path_hash(path: Path) -> str:
    """SHA-256 of a file, or over the names and hashes of a folder's files; of a run folder, of its replay buffer.

    Raises:
        ValueError: there is nothing.
    """
    if path.is_file():
        return sha256_file(path)
    if found := replay_hash(path):
        return found
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        raise ValueError(f"there is nothing to hash at {path}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()}:{sha256_file(file)};".encode())
    return digest.hexdigest()


def prompts_hash(task: Task, split: Split, options: Mapping[str, object]) -> str:
    """SHA-256 over the number of a task's prompts, the first ``PROMPTS`` of them, and the file they come from, if
    any."""
    prompts = task.prompts(split)
    digest = hashlib.sha256(str(len(prompts)).encode())
    for index in range(min(PROMPTS, len(prompts))):
        prompt = prompts[index]
        digest.update(json.dumps([prompt.id, prompt.text, dict(prompt.metadata)], sort_keys=True, default=str).encode())
    path = options.get("path")
    if isinstance(path, str) and Path(path).exists():
        digest.update(path_hash(Path(path)).encode())
    return digest.hexdigest()


def data_sources(config: RunConfig, stage: str) -> tuple[DataSource, ...]:
    """The data sources of an offline stage; none for other stages."""
    return tuple(getattr(settings_of(config, stage), "data", ()))


def result_tags(run_dir: Path, result: Path, source: Path | None) -> dict[str, str]:
    """Hashes of a finished stage: its result, its source, base LM and replay buffer, by name."""
    tags = {
        "checkpoint": str(result),
        "checkpoint_hash": stage_hash(result),
        "source_hash": "" if source is None else stage_hash(source),
        "base_hash": base_hash(result),
        "replay_hash": replay_hash(run_dir),
    }
    return {name: value for name, value in tags.items() if value}


def task_source(config: RunConfig) -> str:
    """A task as JSON: what MLflow shows as the source of its prompts."""
    about: Mapping[str, Any] = {"task": config.task.name, "options": config.task.options}
    return json.dumps(about, default=str)
