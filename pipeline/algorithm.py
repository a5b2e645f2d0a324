"""RLlib's Algorithm for latent-action RL: two loops, one synchronous and one asynchronous."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, LEARNER_RESULTS, WEIGHTS_SEQ_NO

from configs.schema import RunConfig
from latent_control.distributions import rollout_seed
from latent_control.persistence import array_hash
from learners.learner import PolicyLearner
from learners.rl_module import PolicyModule
from pipeline.pool import Answer, RolloutPool
from pipeline.requests import chunk_count, chunks, prompt_indices
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.episodes import HostSpec, PolicyVersion, RolloutRequest
from rollout_workers.hosting import WorkerSettings
from rollout_workers.tasks import build_task

LEARNER_MODULE = f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}"
LEARNER_OPTIMIZER = f"{COMPONENT_LEARNER}/{COMPONENT_OPTIMIZER}"


class LatentRLConfig(AlgorithmConfig):
    """RLlib's config with this project's classes as defaults."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        super().__init__(algo_class=algo_class or LatentRL)

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """The policy module; its ``model_config`` comes with ``rl_module``."""
        return RLModuleSpec(module_class=PolicyModule)

    def get_default_learner_class(self) -> type[PolicyLearner]:
        """The learner."""
        return PolicyLearner


def workers_config(config: RunConfig, settings: WorkerSettings, num_actions: int = 2) -> AlgorithmConfig:
    """The rollout workers' half of an RLlib config, with every default that loses or delays rollouts switched off."""
    rllib = LatentRLConfig()
    rllib.environment(
        env=None, observation_space=gym.spaces.Discrete(2), action_space=gym.spaces.Discrete(num_actions), env_config={"worker": settings}
    )
    rllib.framework("torch")
    rllib.env_runners(
        env_runner_cls=LMEnvRunner,
        num_env_runners=config.rollout.num_workers,
        num_cpus_per_env_runner=config.rollout.cpus_per_worker,
        num_gpus_per_env_runner=config.rollout.gpus_per_worker,
        create_local_env_runner=False,
        sample_timeout_s=None,
        max_requests_in_flight_per_env_runner=2,
    )
    rllib.fault_tolerance(restart_failed_env_runners=True, delay_between_env_runner_restarts_s=0.5, env_runner_health_probe_timeout_s=0.5)
    rllib.debugging(seed=config.seed, log_level="ERROR")
    rllib.merge_env_runner_states = False
    rllib.broadcast_env_runner_states = False
    return rllib


def algorithm_config(
    config: RunConfig, host: HostSpec, *, num_actions: int, reads: str, late_blocks: int, learning_rate: float
) -> AlgorithmConfig:
    """An RLlib config for the ``improve`` section of ``config``, starting from the policy of ``host``."""
    improve, cluster = config.improve, config.cluster
    assert improve is not None
    dtype = "bfloat16" if improve.mixed_precision == "bf16" else "float32"
    settings = WorkerSettings(host=host, policy_dtype=dtype, task=config.task, rollout=config.rollout)
    module = {
        "level": host.level,
        "checkpoint": host.checkpoint,
        "token_blocks": host.token_blocks,
        "trust_remote_code": host.trust_remote_code,
    }
    sampling = {"temperature": config.rollout.temperature, "top_k": config.rollout.top_k}
    rllib = workers_config(config, settings, num_actions)
    rllib.env_config["run"] = config
    rllib.rl_module(rl_module_spec=RLModuleSpec(module_class=PolicyModule, model_config=module))
    rllib.training(lr=learning_rate, grad_clip=improve.gradient_clip, grad_clip_by="global_norm", num_epochs=improve.epochs)
    rllib.learners(
        learner_class=PolicyLearner,
        num_learners=cluster.num_learners,
        num_cpus_per_learner=cluster.cpus_per_learner,
        num_gpus_per_learner=cluster.gpus_per_learner,
        add_default_connectors_to_learner_pipeline=False,
        learner_config_dict={
            "improve": improve,
            "module": module,
            "sampling": sampling,
            "reads": reads,
            "late_blocks": late_blocks,
            "dtype": host.dtype,
        },
    )
    return rllib


class LatentRL(Algorithm):
    """Samples with the latent policy, updates it, publishes it: ``train()`` is one update."""

    @classmethod
    def get_default_config(cls) -> AlgorithmConfig:
        """An empty config of the right class."""
        return LatentRLConfig()

    def setup(self, config: AlgorithmConfig) -> None:
        """Build workers and learner (RLlib), then publish version 0.

        Raises:
            RuntimeError: no worker could start.
        """
        try:
            super().setup(config)
        except IndexError as error:
            # RLlib logs why, goes on, and stumbles over having no worker to ask.
            raise RuntimeError("no rollout worker could start: the log above says why ('Validation of EnvRunner failed!')") from error
        self.run_config: RunConfig = config.env_config["run"]
        self.prompt_count = len(build_task(self.run_config.task).prompts("train"))
        self.pool = RolloutPool(
            self.env_runner_group,
            restore=lambda: self.restore_env_runners(self.env_runner_group),
            timeout=self.run_config.cluster.worker_timeout_seconds,
        )
        self.replay: Any = None
        self.replay_written: ray.ObjectRef | None = None
        self.requested = 0
        self.publish(0)

    # -- the two loops -----------------------------------------------------------------------------------------------

    def training_step(self) -> None:
        """One update."""
        assert self.run_config.improve is not None
        if self.run_config.improve.mode == "async":
            self._asynchronous_step()
        else:
            self._synchronous_step()

    def _synchronous_step(self) -> None:
        """Sample with the current policy, update it, publish it."""
        update = self.policy.version
        requests = self.requests_of(update)
        started = time.perf_counter()
        self.pool.submit(requests)
        answers = self.pool.take(request.request_id for request in requests)
        self._log("seconds_sampling", time.perf_counter() - started)
        self._consume(answers)

    def _asynchronous_step(self) -> None:
        """Keep requests for the next ``max_staleness`` updates in the workers' hands; consume in the order of request.

        A request for update u is sent when the policy's version is at least u - max_staleness, so no rollout can be
        staler than that when it is consumed, and none has to be dropped.
        """
        assert self.run_config.improve is not None
        update = self.policy.version
        self.requested = max(self.requested, update)
        while self.requested <= update + self.run_config.improve.max_staleness:
            self.pool.submit(self.requests_of(self.requested))
            self.requested += 1
        started = time.perf_counter()
        answers = self.pool.take(request.request_id for request in self.requests_of(update))
        self._log("seconds_waiting", time.perf_counter() - started)
        self._consume(answers)
        self.pool.poll()

    def requests_of(self, update: int) -> list[RolloutRequest]:
        """The requests of an update, under the current policy version."""
        run, improve = self.run_config, self.run_config.improve
        assert improve is not None
        indices = prompt_indices(update, improve.prompts_per_update, size=self.prompt_count, seed=run.seed)
        parts = chunks(indices, chunk_count(len(indices), run.rollout.num_workers, run.cluster.num_learners))
        return [
            RolloutRequest(
                request_id=update * len(parts) + number,
                split="train",
                prompt_indices=part,
                group_size=improve.group_size,
                seed=rollout_seed(run.seed, update) >> 1,
                policy=self.policy,
                temperature=run.rollout.temperature,
                top_k=run.rollout.top_k,
                ship_features=improve.features == "ship",
            )
            for number, part in enumerate(parts)
        ]

    # -- one update --------------------------------------------------------------------------------------------------

    def _consume(self, answers: Sequence[Answer]) -> None:
        """Update the policy on these answers, store them, publish the new version."""
        self._check_hashes(answers)
        refs = [answer.rollouts for answer in answers]
        if self.replay is not None:
            self._store(refs)
        self._log_rollouts(answers)
        improve, learners = self.run_config.improve, max(1, self.run_config.cluster.num_learners)
        assert improve is not None
        rows = max(1, math.ceil(sum(a.summary.rollouts for a in answers) / learners))
        started = time.perf_counter()
        results = self.learner_group.update(
            training_data=TrainingData(episodes_refs=refs),
            num_epochs=improve.epochs,
            minibatch_size=math.ceil(rows / improve.minibatches),
            num_total_minibatches=improve.epochs * improve.minibatches,
            shuffle_batch_per_epoch=improve.minibatches > 1,
        )
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        self._log("seconds_updating", time.perf_counter() - started)
        started = time.perf_counter()
        self.publish(self.policy.version + 1)
        self._log("seconds_publishing", time.perf_counter() - started)

    def _check_hashes(self, answers: Sequence[Answer]) -> None:
        """A rollout sampled with other weights than its request named must never be trained on."""
        for answer in answers:
            asked, got = answer.request.policy, answer.summary
            assert asked is not None and (asked.version, asked.weights_hash) == (got.policy_version, got.policy_hash), (
                f"request {got.request_id} was sampled with {got.policy_version}/{got.policy_hash[:12]}"
            )

    def _store(self, refs: list[ray.ObjectRef]) -> None:
        """Hand the rollouts to the replay buffer; one batch may be on its way while the learner works."""
        self._await_replay()
        self.replay_written = self.replay.add.remote(refs)

    def _await_replay(self) -> None:
        if self.replay_written is not None:
            lost = ray.get(self.replay_written).lost
            self.replay_written = None
            if lost:
                raise RuntimeError(f"{len(lost)} batches of rollouts were lost before they reached the replay buffer: {lost[0]}")

    def flush_replay(self) -> None:
        """Put every rollout trained on so far on the disk."""
        if self.replay is not None:
            self._await_replay()
            ray.get(self.replay.flush.remote())

    def _log_rollouts(self, answers: Sequence[Answer]) -> None:
        rewards = [r for a in answers for r in a.summary.rewards if not math.isnan(r)]
        rollouts = sum(a.summary.rollouts for a in answers)
        tokens = sum(a.summary.tokens for a in answers)
        staleness = [self.policy.version - a.summary.policy_version for a in answers]
        self._log("reward", sum(rewards) / max(1, len(rewards)))
        self._log("success", sum(s for a in answers for s in a.summary.successes) / rollouts)
        self._log("failures", sum(a.summary.failures for a in answers))
        self._log("rollouts", rollouts)
        self._log("tokens", tokens)
        self._log("tokens_per_rollout", tokens / rollouts)
        self._log("staleness_mean", sum(staleness) / len(staleness))
        self._log("staleness_max", max(staleness))
        self._log("worker_seconds", sum(a.summary.seconds for a in answers))
        self.metrics.aggregate(self.pool.metrics, key=ENV_RUNNER_RESULTS)
        self.pool.metrics.clear()

    def _log(self, name: str, value: float) -> None:
        self.metrics.log_value(("improve", name), value, window=1)

    def publish(self, version: int) -> None:
        """Make the learner's weights the policy of all requests to come."""
        state = self.learner_group.get_state(components=LEARNER_MODULE, inference_only=True)
        weights = state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
        self.weights = weights
        self.policy = PolicyVersion(version=version, weights_hash=array_hash(weights), weights=ray.put(weights))

    # -- state, as plain arrays ---------------------------------------------------------------------------------------

    def learner_state(self) -> dict[str, Any]:
        """Weights, optimiser state and version: all that a resumed run needs, since prompts and seeds follow from the version."""
        state = self.learner_group.get_state(components=[LEARNER_MODULE, LEARNER_OPTIMIZER])[COMPONENT_LEARNER]
        return {
            "version": self.policy.version,
            COMPONENT_RL_MODULE: state[COMPONENT_RL_MODULE],
            COMPONENT_OPTIMIZER: state[COMPONENT_OPTIMIZER],
        }

    def restore_learner(self, state: dict[str, Any]) -> None:
        """Continue from ``learner_state``."""
        parts = {name: state[name] for name in (COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER)}
        self.learner_group.set_state({COMPONENT_LEARNER: {**parts, WEIGHTS_SEQ_NO: state["version"]}})
        self.publish(state["version"])

    def cleanup(self) -> None:
        """Put the replay buffer on the disk, then stop workers and learners."""
        self.flush_replay()
        super().cleanup()
