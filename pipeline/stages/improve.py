"""The improve stage: reinforcement learning on RLlib, resumable at every checkpoint."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
from safetensors.torch import save_file

from configs.schema import Improve, RunConfig, TokenTrains
from latent_control.pretrained import read_shape, with_policy
from latent_control.token_policy import Trains
from pipeline.cluster.connect import connected
from pipeline.replay.actor import BufferPlace, ReplayActor, ReplayHandle, SharedReplayHandle, beside_driver
from pipeline.replay.writer import ReplayWriter
from pipeline.rl.accounting import Records
from pipeline.rl.algorithm import LatentRL
from pipeline.rl.config import algorithm_config, without_workers
from pipeline.rl.ledger import Ledger, read
from pipeline.rl.resume_point import resume_point
from pipeline.rl.rollout_pool import PartLost
from pipeline.rl.shared_pool import Share
from pipeline.rl.watchdog import Watchdog
from pipeline.rl.worker_group import Scaler, Unscaled
from pipeline.rl.worker_health import LONGEST_REST
from pipeline.runs import interrupts, seals
from pipeline.runs.context import StageContext, StageResult
from pipeline.runs.errors import RunError, first_line
from pipeline.runs.layout import METRICS, QUARANTINE, REPLAY, TOKEN_POLICY
from pipeline.runs.metrics_log import ends, series, total
from pipeline.runs.stage_table import Stage, level_of
from pipeline.stages.token_checkpoint import token_start, write_info
from pipeline.storage import checkpoints
from pipeline.tracking.provenance import circumstances
from rollout_workers.rollouts import HostSpec, Rollout
from rollout_workers.tasks.rewards import reward_hash

TOKEN_READS = {"last_blocks": "late", "steering": "late", "added_blocks": "final", "mlp": "final", "all": "tokens"}
LEARNER_METRICS = (
    *("policy_loss", "steps_taken", "entropy", "clip_share", "ratio_mean", "logp_gap", "rescored_gap"),
    *("kl_to_reference", "kl_to_start", "importance_mean", "importance_capped_share", "value_loss", "value_mean"),
    "gradients_default_optimizer_global_norm",
)
LOSSES = (RayActorError, ObjectLostError, NodeDiedError, WorkerCrashedError, OutOfMemoryError, PartLost)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where RL starts from: a host and the shape of its policy."""

    host: HostSpec
    num_actions: int
    reads: str
    late_blocks: int
    learning_rate: float
    span: int = 1


def hosted_as(trains: TokenTrains) -> Trains:
    """What workers and checkpoints hold of a token-level policy that is trained so: adapters merged."""
    return "last_blocks" if trains == "lora" else trains


def starting_point(config: RunConfig, improve: Improve, source: Path, level: str) -> Start:
    """The policy of ``level`` on top of ``source``: a checkpoint with latent actions, or, at token level, of a base LM
    alone (``token_sft``)."""
    common: dict[str, Any] = {"dtype": config.base.dtype, "trust_remote_code": config.base.trust_remote_code}
    if level == "latent":
        shape = read_shape(source)
        host = HostSpec(level="latent", checkpoint=str(source), **common)
        return Start(
            host=host,
            num_actions=shape.num_actions,
            reads=shape.policy_state,
            late_blocks=shape.late_blocks,
            learning_rate=improve.learning_rate,
            span=shape.span,
        )
    info = token_start(source)
    blocks = improve.token_blocks or info["token_blocks"]
    hosted = hosted_as(improve.token_trains)
    host = HostSpec(level="token", checkpoint=info["base"], token_trains=hosted, token_blocks=blocks, **common)
    reads = TOKEN_READS[hosted]
    return Start(
        host=host,
        num_actions=2,  # RLlib only wants to know that actions are numbers
        reads=reads,
        late_blocks=blocks if reads == "late" else 0,
        learning_rate=improve.token_learning_rate or improve.learning_rate,
    )


def run_improve(context: StageContext, stage: Stage, source: Path | None) -> StageResult:
    """Train the policy of ``stage`` from ``source`` until ``improve.updates``; the result replaces the policy and
    nothing else.

    When a part dies that cannot be replaced in flight (a learner, the replay buffer's actor), all is rebuilt from the
    newest checkpoint, ``cluster.max_rebuilds`` times, each time after a longer rest. An error of data, reward or code
    comes out as it is.

    Raises:
        RunError: parts of it were lost too often, or workers, verifiers or numbers fail too often.
        ValueError: there are no latent actions to start from.
    """
    config, improve = context.config, context.config.improve
    assert improve is not None
    if source is None:
        raise ValueError(
            "the improve stage needs latent actions: add the actions section, "
            "or set actions.init to a checkpoint with actions.updates=0"
        )
    start = starting_point(config, improve, source, level_of(config, stage.name))
    work = ImproveStage(context=context, stage=stage.name, source=source, start=start, improve=improve)
    with connected(config):
        torch.set_num_threads(config.cluster.learner_threads)
        rebuilds, weights = itertools.count(1), None
        while weights is None:
            try:
                weights = work.train()
            except LOSSES as error:
                work.rest(error, next(rebuilds))
    return work.finish(weights)


@dataclass(kw_only=True)
class ImproveStage:
    """One improve stage, from its start or its newest checkpoint to its result."""

    context: StageContext
    stage: str
    source: Path
    """The checkpoint that RL starts from."""
    start: Start
    improve: Improve
    rewards: list[float] = field(default_factory=list)
    """The mean reward of each update so far."""

    def rest(self, error: Exception, number: int) -> None:
        """Wait before rebuild ``number``; ``RunError`` when there were too many."""
        most, lost = self.context.config.cluster.max_rebuilds, first_line(error)
        if number > most:
            text = f"{self.stage} lost a part of itself once more than cluster.max_rebuilds={most}: {lost}"
            raise RunError(f"{text}; look at the cluster's nodes and memory, or raise it") from error
        rest = min(LONGEST_REST, float(2**number))
        text = f"{self.stage}: {lost}; rebuilt from the newest checkpoint in {rest:g} s ({number} of {most} times)"
        self.context.log.message(text, "rebuilt", stage=self.stage, number=number, reason=type(error).__name__)
        rested = time.monotonic() + rest
        pause = partial(time.sleep, 0.1) if self.context.workers is None else self.context.workers.pause
        while time.monotonic() < rested:
            interrupts.check()
            pause()

    def train(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """The updates that are left; the policy's weights at the last one. ``Stopped`` comes out between two of
        them."""
        with self._algorithm() as algorithm, self._own_workers(algorithm) as workers:
            for update in range(algorithm.policy.version + 1, self.improve.updates + 1):
                workers.before_update()
                metrics = update_metrics(algorithm.train())
                workers.after_update(metrics)
                self.rewards.append(metrics["reward"])
                try:
                    metrics |= self._heldout(algorithm, update)
                finally:  # the update is done, whatever comes between its evaluation and the end of it
                    self.context.log.log(self.stage, update, metrics)
                if update % self.improve.checkpoint_every == 0 and update < self.improve.updates:
                    self._save(algorithm, update)
        return algorithm.weights

    @contextmanager
    def _algorithm(self) -> Iterator[LatentRL]:
        """Workers and learner as the newest checkpoint left them, from their making to their end."""
        algorithm = build(self.context.config, self.start, self.context.workers)
        try:
            self._restore(algorithm)
            self.context.log.begin(self.stage, self.improve.updates)
            try:
                yield algorithm
            except interrupts.Stopped as stop:
                if stop.whole and algorithm.policy.version > 0:
                    self._save(algorithm, algorithm.policy.version)
                raise
            algorithm.flush()
        finally:
            algorithm.stop()

    @contextmanager
    def _own_workers(self, algorithm: LatentRL) -> Iterator[Scaler | Unscaled]:
        """Who changes the number of workers between updates, and ends the run if it hangs; shared ones are not its
        affair."""
        context = self.context
        if context.workers is not None:
            yield Unscaled(algorithm.pool, context.log.message)
            return
        with Watchdog(context.run_dir, context.config.cluster.stall_seconds) as watchdog:
            yield Scaler(context.config, context.run_dir, algorithm.worker_group, context.log.message, watchdog.pat)

    def _restore(self, algorithm: LatentRL) -> None:
        """Go back to the newest valid checkpoint, log and ledger with it."""
        log, stage = self.context.log, self.stage
        found, skipped = resume_point(self.context.run_dir, stage, stored=self.context.config.replay.enabled)
        for reason in skipped:
            log.message(f"skipped checkpoint {reason}", "checkpoint_skipped", stage=stage)
        self.rewards = []
        if found is not None:
            state = checkpoints.load_tree(found, "learner")
            self.rewards = state.pop("rewards")
            algorithm.restore_learner(state)
            if (found / METRICS).is_file():
                log.restore(found / METRICS)
        ledger = Ledger(self.context.run_dir, stage)
        replay = replay_actor(self.context, stage) if self.context.config.replay.enabled else None
        definition = reward_hash(self.context.config.task, self.context.config.reward)
        wrong = ledger.begin(algorithm.policy.version, skipped, reward_hash=definition)
        records = Records(ledger=ledger, replay=replay, quarantine=partial(quarantine, self.context, stage))
        algorithm.attach(records, read(self.context.run_dir, stage).attempts if self.improve.curriculum < 1 else ())
        if wrong:
            log.message(f"{stage}: the ledger's {wrong}; begun again", "ledger_mended", stage=stage)
        log.truncate(stage, algorithm.policy.version)

    def _heldout(self, algorithm: LatentRL, update: int) -> dict[str, float]:
        """Success on held-out prompts where one is due; the best policy so far is kept if that is wanted."""
        every = self.improve.evaluate_every
        if every is None or (update % every and update != self.improve.updates):
            return {}
        metrics = algorithm.play_heldout()
        if self.improve.keep_best:
            self._keep_if_best(update, metrics["heldout_success"], algorithm.weights)
        return metrics

    def _keep_if_best(self, update: int, success: float, weights: Mapping[str, Any]) -> None:
        """Keep these weights as ``checkpoints/<stage>_best``, a result like the stage's own, if they did better than
        those kept, also by an earlier start."""
        folder = self.context.result(f"{self.stage}_best")
        if not checkpoints.verify(folder) and checkpoints.read_info(folder)["heldout_success"] >= success:
            return
        info = {"stage": self.stage, "update": update, "heldout_success": success}
        info |= circumstances(self.context.config, self.context.run_dir, self.stage, update)
        checkpoints.write(folder, files=partial(_result_files, self.source, self.start, weights), info=info)

    def _save(self, algorithm: LatentRL, update: int) -> None:
        algorithm.flush()
        state = {**algorithm.learner_state(), "rewards": self.rewards}
        info = {"stage": self.stage, "update": update} | standing(self.context, self.stage, algorithm)

        def files(staging: Path) -> None:
            checkpoints.save_tree(staging, "learner", state)
            self.context.log.snapshot(staging / METRICS)

        checkpoints.write(self.context.checkpoints / f"{self.stage}-{update:08d}", files=files, info=info)
        seals.saved(self.context.run_dir, self.stage, keep=self.improve.keep_checkpoints)

    def finish(self, weights: Mapping[str, np.ndarray[Any, Any]]) -> StageResult:
        """Write the result: the source checkpoint with the new policy, or the token-level policy by itself."""
        rewards, context, stage = self.rewards, self.context, self.stage
        metrics = dict(zip(("reward_first", "reward_last"), ends(rewards), strict=True)) if rewards else {}
        if tied := series(context.log.path, stage, "tied_groups"):
            metrics["tied_groups"] = mean(tied)
        metrics |= {
            "tokens": total(context.log.path, stage, "tokens"),
            "parameters_trained": float(self._parameters_trained(weights)),
        }
        info = {"stage": stage, "metrics": metrics}
        info |= circumstances(context.config, context.run_dir, stage, self.improve.updates)
        checkpoints.write(
            context.result(stage), files=partial(_result_files, self.source, self.start, weights), info=info
        )
        seals.saved(context.run_dir, stage, keep=0)
        return StageResult(checkpoint=context.result(stage), metrics=metrics)

    def _parameters_trained(self, weights: Mapping[str, np.ndarray[Any, Any]]) -> int:
        """How many numbers RL changed; of merged adapters those of their two factors."""
        if self.start.host.level == "token" and self.improve.token_trains == "lora":
            return self.improve.token_rank * sum(sum(w.shape) for w in weights.values() if w.ndim == 2)
        return sum(w.size for w in weights.values())


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def build(config: RunConfig, start: Start, workers: Share | None = None) -> LatentRL:
    """Workers (unless they are shared ``workers``) and learner, started; ``stop`` them."""
    rllib = algorithm_config(
        config,
        start.host,
        num_actions=start.num_actions,
        reads=start.reads,
        late_blocks=start.late_blocks,
        learning_rate=start.learning_rate,
        span=start.span,
    )
    with interrupts.at_once():
        algorithm: LatentRL = (rllib if workers is None else without_workers(rllib)).build_algo()
    if workers is not None:
        algorithm.share(workers.join(rllib.env_config["worker"], rllib.rl_module_spec.model_config))
    return algorithm


def quarantine(context: StageContext, stage: str, update: int, rollouts: list[Rollout], reason: str) -> None:
    """Keep the rollouts of a skipped update as ``<run>/quarantine``, a folder of the replay buffer's form that no stage
    reads."""
    folder = context.run_dir / QUARANTINE
    writer = ReplayWriter(folder, context.config.replay.rows_per_shard, run_id_of(folder, stage))
    writer.add(rollouts)
    writer.close()
    text = f"{stage}: update {update} was skipped ({reason}); its {len(rollouts)} rollouts lie in {QUARANTINE}/"
    context.log.message(text, "update_skipped", stage=stage, update=update)


def run_id_of(folder: Path, stage: str) -> str:
    """By which rows of ``stage`` are known in a run's ``folder`` of rollouts: its name when the stage began, as a run
    that was renamed and resumed samples again what is stored already."""
    begun = sorted(path.name for path in folder.glob(f"run=*-{stage}"))
    return begun[0].removeprefix("run=") if begun else f"{folder.parent.name}-{stage}"


def replay_actor(context: StageContext, stage: str) -> ReplayHandle:
    """What writes this stage's rollouts to Parquet."""
    folder = context.run_dir / REPLAY
    buffer = BufferPlace(str(folder), context.config.replay.rows_per_shard, run_id_of(folder, stage))
    if context.workers is not None:
        return SharedReplayHandle(context.workers.replay, buffer)
    return ReplayHandle(beside_driver(ReplayActor).remote(*buffer))


def update_metrics(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of one update out of RLlib's result."""
    learner = result["learners"]["default_policy"]
    metrics = {name: float(value) for name, value in result["improve"].items()}
    metrics |= {name: float(learner[name]) for name in LEARNER_METRICS if name in learner}
    return metrics | {"seconds_update_total": float(result["time_this_iter_s"])}


def standing(context: StageContext, stage: str, algorithm: LatentRL) -> dict[str, Any]:
    """What a checkpoint's manifest says of where it came from, and of where policy, ledger and stream of prompts
    stand."""
    found = circumstances(context.config, context.run_dir, stage, algorithm.policy.version)
    return found | {
        "policy": {"version": algorithm.policy.version, "weights_hash": algorithm.policy.weights_hash},
        "ledger": {"last_update": algorithm.policy.version, "open_positions": len(algorithm.stream.unfinished())},
        "random": found["random"] | {"next_position": algorithm.stream.next_position},
    }


def _result_files(source: Path, start: Start, weights: Mapping[str, Any], folder: Path) -> None:
    host = start.host
    if host.level == "latent":
        with_policy(source, folder, dict(weights))
        return
    save_file({name: torch.from_numpy(array.copy()) for name, array in weights.items()}, folder / TOKEN_POLICY)
    write_info(folder, host.checkpoint, host.token_blocks, host.token_trains)
