"""The improve stage: reinforcement learning on RLlib, resumable at every checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import save_file

from configs.schema import Improve
from latent_control.model import LatentActionConfig
from latent_control.persistence import base_path, read_config, with_policy
from pipeline import checkpoints, stopping
from pipeline.algorithm import BROKEN, LatentRL, algorithm_config
from pipeline.cluster import connected
from pipeline.context import StageContext, StageResult
from pipeline.crew import Scaler
from pipeline.ledger import QUARANTINE, Ledger
from pipeline.pool import this_node
from pipeline.replay import ReplayActor, ReplayWriter
from pipeline.runlog import total
from rollout_workers.episodes import HostSpec, Rollout

TOKEN_POLICY, TOKEN_INFO = "token_policy.safetensors", "token_policy.json"
TOKEN_READS = {"last_blocks": "late", "added_blocks": "final", "all": "tokens"}
LEARNER_METRICS = (
    *("policy_loss", "steps_taken", "entropy", "clip_share", "ratio_mean", "logp_gap", "kl_to_reference"),
    *("importance_mean", "importance_capped_share", "value_loss", "value_mean", "gradients_default_optimizer_global_norm"),
)
RECENT = 10  # updates whose mean reward the summary reports


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where RL starts from: a host and the shape of its policy."""

    host: HostSpec
    num_actions: int
    reads: str
    late_blocks: int
    learning_rate: float
    span: int = 1


def starting_point(context: StageContext, improve: Improve, source: Path, level: str) -> Start:
    """The policy of ``level`` on top of latent-action checkpoint ``source``."""
    base, shape = context.config.base, LatentActionConfig(**read_config(source)["latent_actions"])
    common: dict[str, Any] = {"dtype": base.dtype, "trust_remote_code": base.trust_remote_code}
    if level == "latent":
        host = HostSpec(level="latent", checkpoint=str(source), **common)
        return Start(
            host=host,
            num_actions=shape.num_actions,
            reads=shape.policy_reads,
            late_blocks=shape.policy_layers,
            learning_rate=improve.learning_rate,
            span=shape.span,
        )
    blocks = improve.token_blocks or shape.policy_layers
    host = HostSpec(level="token", checkpoint=base_path(source), token_trains=improve.token_trains, token_blocks=blocks, **common)
    reads = TOKEN_READS[improve.token_trains]
    return Start(
        host=host,
        num_actions=2,  # RLlib only wants to know that actions are numbers
        reads=reads,
        late_blocks=blocks if reads == "late" else 0,
        learning_rate=improve.token_learning_rate or improve.learning_rate,
    )


def run_improve(context: StageContext, stage: str, source: Path, level: str) -> StageResult:
    """Train the policy of ``level`` from ``source`` until ``improve.updates``; the result replaces the policy and nothing else."""
    improve = context.config.improve
    assert improve is not None
    start = starting_point(context, improve, source, level)
    with connected(context.config):
        torch.set_num_threads(context.config.cluster.learner_threads)
        rllib = algorithm_config(
            context.config,
            start.host,
            num_actions=start.num_actions,
            reads=start.reads,
            late_blocks=start.late_blocks,
            learning_rate=start.learning_rate,
            span=start.span,
        )
        with stopping.at_once():
            algorithm: LatentRL = rllib.build_algo()
        try:
            rewards = _loop(context, stage, algorithm, improve)
            weights = algorithm.weights
        finally:
            algorithm.stop()
    metrics = {"reward_first": mean(rewards[:RECENT]), "reward_last": mean(rewards[-RECENT:])} if rewards else {}
    metrics |= {"tokens": total(context.log.path, stage, "tokens"), "parameters_trained": float(sum(w.size for w in weights.values()))}
    _finish(context, stage, source, start, weights, metrics)
    return StageResult(checkpoint=context.result(stage), metrics=metrics)


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def _loop(context: StageContext, stage: str, algorithm: LatentRL, improve: Improve) -> list[float]:
    """Updates from wherever the newest valid checkpoint stands; returns each update's mean reward."""
    found, skipped = checkpoints.newest_valid(context.checkpoints, stage)
    for reason in skipped:
        context.log.message(f"skipped checkpoint {reason}")
    rewards: list[float] = []
    if found is not None:
        state = checkpoints.load_tree(found, "learner")
        rewards = state.pop("rewards")
        algorithm.restore_learner(state)
    if context.config.replay.enabled:
        algorithm.replay = replay_actor(context, stage)
    algorithm.quarantine = partial(quarantine, context, stage)
    algorithm.ledger = Ledger(context.run_dir, stage)
    algorithm.ledger.begin(algorithm.policy.version, skipped)
    context.log.truncate(stage, algorithm.policy.version)
    try:
        with context.log.stage(stage, improve.updates):
            _updates(context, stage, algorithm, improve, rewards)
    except stopping.Stopped:
        if algorithm.policy.version > 0:
            _save(context, stage, algorithm.policy.version, algorithm, rewards)
        raise
    algorithm.flush_replay()
    algorithm.flush_ledger()
    return rewards


def _updates(context: StageContext, stage: str, algorithm: LatentRL, improve: Improve, rewards: list[float]) -> None:
    """The updates that are left; each appends its mean reward. ``Stopped`` comes out between two of them."""
    scaler = Scaler(context.config, context.run_dir, algorithm.crew, context.log.message)
    for update in range(algorithm.policy.version + 1, improve.updates + 1):
        scaler.before_update()
        metrics = update_metrics(algorithm.train())
        scaler.after_update(metrics)
        rewards.append(metrics["reward"])
        try:
            if improve.evaluate_every is not None and (update % improve.evaluate_every == 0 or update == improve.updates):
                metrics |= algorithm.play_heldout()
        finally:  # the update is done, whatever comes between its play and the end of it
            context.log.log(stage, update, metrics)
        if update % improve.checkpoint_every == 0 and update < improve.updates:
            _save(context, stage, update, algorithm, rewards)


def quarantine(context: StageContext, stage: str, update: int, rollouts: list[Rollout]) -> None:
    """Keep the rollouts of a skipped update as ``<run>/quarantine``, a folder of the replay buffer's form that no stage reads."""
    writer = ReplayWriter(context.run_dir / QUARANTINE, context.config.replay.rows_per_shard, f"{context.run_dir.name}-{stage}")
    writer.add(rollouts)
    writer.close()
    context.log.message(f"{stage}: update {update} was skipped ({BROKEN}); its {len(rollouts)} rollouts lie in {QUARANTINE}/")


def replay_actor(context: StageContext, stage: str) -> Any:
    """The actor that writes this stage's rollouts to Parquet; it restarts, and drops what it has written already."""
    # Beside the driver: another node, once lost, would take along what is not on the disk yet.
    beside = NodeAffinitySchedulingStrategy(this_node(), soft=False)
    writer = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=beside)(ReplayActor)
    return writer.remote(str(context.run_dir / "replay"), context.config.replay.rows_per_shard, f"{context.run_dir.name}-{stage}")


def update_metrics(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of one update out of RLlib's result."""
    learner = result["learners"]["default_policy"]
    metrics = {name: float(value) for name, value in result["improve"].items()}
    metrics |= {name: float(learner[name]) for name in LEARNER_METRICS if name in learner}
    return metrics | {"seconds_update_total": float(result["time_this_iter_s"])}


def _save(context: StageContext, stage: str, update: int, algorithm: LatentRL, rewards: list[float]) -> None:
    algorithm.flush_replay()
    algorithm.flush_ledger()
    state = {**algorithm.learner_state(), "rewards": rewards}
    folder = context.checkpoints / f"{stage}-{update:08d}"
    checkpoints.write(folder, files=lambda tmp: checkpoints.save_tree(tmp, "learner", state), info={"stage": stage, "update": update})
    checkpoints.prune(context.checkpoints, stage, keep=2)


def _finish(context: StageContext, stage: str, source: Path, start: Start, weights: dict[str, Any], metrics: dict[str, float]) -> None:
    """Write the stage's result: the source checkpoint with the new policy, or the token-level policy by itself."""

    def files(folder: Path) -> None:
        if start.host.level == "latent":
            with_policy(source, folder, weights)
            return
        save_file({name: torch.from_numpy(array.copy()) for name, array in weights.items()}, folder / TOKEN_POLICY)
        host = start.host
        info = {"base": host.checkpoint, "token_trains": host.token_trains, "token_blocks": host.token_blocks}
        (folder / TOKEN_INFO).write_text(json.dumps(info))

    checkpoints.write(context.result(stage), files=files, info={"stage": stage, "metrics": metrics})
    checkpoints.prune(context.checkpoints, stage, keep=0)
