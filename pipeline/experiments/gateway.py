"""``latent-control gateway``: an agent program plays with a run's policy, and its episodes are stored as rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ray

from configs.loading import load_config
from configs.schema import RunConfig, TaskConfig
from pipeline.cluster.connect import connected
from pipeline.replay.writer import ReplayWriter
from pipeline.rl.heldout import heldout_requests
from pipeline.runs.layout import CONFIG
from pipeline.serving.export import find
from pipeline.stages.play import players
from rollout_workers.gateway.task import KINDS, GatewayTask
from rollout_workers.rollouts import HostSpec, Rollout
from rollout_workers.tasks import build_task

WRITER = "gateway"
PER_SHARD = 4096


def play_program(
    target: Path,
    program: Path | None,
    *,
    episodes: int,
    samples: int,
    split: Literal["train", "heldout"],
    greedy: bool,
    seed: int | None,
    out: Path,
) -> dict[str, Any]:
    """Play ``samples`` of each of the first ``episodes`` episodes and add them to the rollouts in ``out``.

    Args:
        target: a run (its last policy), or one of its checkpoints.
        program: the agent program; ``None``: the one that the run's own task names.
        seed: of the sampled codes; ``None``: the run's. The same episodes of the same seed are stored once.

    Returns: ``{"episodes", "success", "reward", "tokens", "failures": {"kind: message": n}, "stored", "folder"}``;
        means are over the episodes that were judged.

    Raises:
        ValueError: there is no policy or no program.
    """
    source = find(target)
    if source.run_dir is None:
        raise ValueError(f"{target} is not in a run folder, which says how rollouts are made; give RUN")
    config = gateway_config(load_config(source.run_dir / CONFIG, check_paths=False), program)
    config = config if seed is None else config.model_copy(update={"seed": seed})
    task = build_task(config.task)
    assert isinstance(task, GatewayTask)
    episodes = min(episodes, len(task.prompts(split)))
    host = HostSpec(
        level="latent",
        checkpoint=str(source.checkpoint),
        dtype=config.base.dtype,
        trust_remote_code=config.base.trust_remote_code,
    )
    temperature = 0.0 if greedy else config.rollout.temperature
    asked = heldout_requests(
        config, episodes, config.rollout.num_workers, samples=samples, temperature=temperature, host=host
    )
    with connected(config), players(config) as pool:
        # Greedy episodes have other seeds than sampled ones, and so other ids.
        pool.submit([replace(one, split=split, seeds=tuple(seed + greedy for seed in one.seeds)) for one in asked])
        finished = pool.take(request.request_id for request in asked)
        rollouts = [rollout for one in finished for rollout in ray.get(one.rollouts)]
    writer = ReplayWriter(out, PER_SHARD, WRITER)
    stored = writer.add(rollouts).rows
    writer.close()
    return summed(rollouts) | {"stored": stored, "folder": str(out)}


def gateway_config(config: RunConfig, program: Path | None) -> RunConfig:
    """The run's config with ``program`` as its task; ``ValueError`` where neither it nor the config names one."""
    if program is not None:
        task = TaskConfig(name=f"{KINDS[0]}/{program.stem}", options={"program": str(program.absolute())})
        return config.model_copy(update={"task": task})
    if config.task.name.partition("/")[0] not in KINDS:
        raise ValueError(f"the run's task is {config.task.name}, no agent program; name one with --program FILE")
    return config


def summed(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """What came of the episodes."""
    judged = [(float(r.success), r.reward) for r in rollouts if r.reward is not None]
    success, reward = (sum(some) / len(judged) for some in zip(*judged, strict=True)) if judged else (None, None)
    return {
        "episodes": len(rollouts),
        "success": success,
        "reward": reward,
        "tokens": sum(r.new_tokens for r in rollouts),
        "failures": dict(Counter(r.failure for r in rollouts if r.failure is not None)),
    }
