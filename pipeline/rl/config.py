"""RLlib's config for latent-action RL, made from a run's config."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from configs.schema import RunConfig
from latent_control.algorithms import ALGORITHMS
from learners.learner import PolicyLearner
from learners.rl_module import PolicyModule
from learners.settings import KEY, LearnerSettings
from learners.sharded_learner import ShardedLearner, ShardedLearnerGroup
from pipeline.rl.algorithm import LatentRL
from rollout_workers.bank_runner import BankEnvRunner
from rollout_workers.env_runner import LMEnvRunner, NoRolloutWorker
from rollout_workers.model_host import WorkerSettings
from rollout_workers.rollouts import HostSpec


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

    def build_learner_group(self, *, rl_module_spec: MultiRLModuleSpec, **others: Any) -> LearnerGroup:
        """The learner actors, or the learner in this process."""
        if self.learner_class is ShardedLearner:
            return ShardedLearnerGroup(config=self.copy(), module_spec=rl_module_spec)
        return super().build_learner_group(rl_module_spec=rl_module_spec, **others)


def workers_config(config: RunConfig, settings: WorkerSettings, num_actions: int = 2) -> AlgorithmConfig:
    """The rollout workers' half of an RLlib config, with every default that loses or delays rollouts switched off."""
    rllib = LatentRLConfig()
    rllib.environment(
        env=None,
        observation_space=gym.spaces.Discrete(2),
        action_space=gym.spaces.Discrete(num_actions),
        env_config={"worker": settings},
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
    rllib.fault_tolerance(
        restart_failed_env_runners=True, delay_between_env_runner_restarts_s=0.5, env_runner_health_probe_timeout_s=0.1
    )
    rllib.debugging(seed=config.seed, log_level="ERROR")
    rllib.merge_env_runner_states = False
    rllib.broadcast_env_runner_states = False
    return rllib


def ships_features(config: RunConfig, host: HostSpec) -> bool:
    """Whether rollouts bring the base's features along; a policy that is the whole model reads none."""
    whole = host.level == "token" and host.token_trains == "all"
    return config.ships_features and not whole


def algorithm_config(
    config: RunConfig,
    host: HostSpec,
    *,
    num_actions: int,
    reads: str,
    late_blocks: int,
    learning_rate: float,
    span: int = 1,
) -> AlgorithmConfig:
    """An RLlib config for the ``improve`` section of ``config``, starting from the policy of ``host``."""
    improve, cluster = config.improve, config.cluster
    assert improve is not None
    dtype = "bfloat16" if improve.mixed_precision == "bf16" else "float32"
    settings = WorkerSettings(
        host=host, policy_dtype=dtype, task=config.task, rollout=config.rollout, reward=config.reward
    )
    module = {
        "level": host.level,
        "checkpoint": host.checkpoint,
        "token_trains": host.token_trains,
        "token_blocks": host.token_blocks,
        "trust_remote_code": host.trust_remote_code,
        "trains": improve.trains,
    }
    adapter_rank = improve.token_rank if host.level == "token" and improve.token_trains == "lora" else None
    sampling = {"temperature": config.rollout.temperature, "top_k": config.rollout.top_k}
    rllib = workers_config(config, settings, num_actions)
    rllib.env_config |= {"run": config, "ships_features": ships_features(config, host)}
    critic = ALGORITHMS[improve.algorithm].critic
    rllib.rl_module(
        rl_module_spec=RLModuleSpec(
            module_class=PolicyModule, model_config={**module, "critic": critic, "adapter_rank": adapter_rank}
        )
    )
    rllib.training(
        lr=learning_rate, grad_clip=improve.gradient_clip, grad_clip_by="global_norm", num_epochs=improve.epochs
    )
    rllib.learners(
        learner_class=ShardedLearner if improve.shard else PolicyLearner,
        num_learners=cluster.num_learners,
        num_cpus_per_learner=cluster.cpus_per_learner,
        num_gpus_per_learner=cluster.gpus_per_learner,
        add_default_connectors_to_learner_pipeline=False,
        learner_config_dict={
            KEY: LearnerSettings(
                improve=improve,
                module=module,
                sampling=sampling,
                recompute=not ships_features(config, host),
                reads=reads,
                late_blocks=late_blocks,
                dtype=host.dtype,
                span=span,
                longest=config.rollout.max_new_tokens,
            )
        },
    )
    return rllib


def without_workers(rllib: AlgorithmConfig) -> AlgorithmConfig:
    """The config of a run that samples with the workers of others."""
    return rllib.env_runners(env_runner_cls=NoRolloutWorker, num_env_runners=0, create_local_env_runner=True)


def shared_workers(config: RunConfig, settings: WorkerSettings, num_actions: int) -> EnvRunnerGroup:
    """Rollout workers for many policies in the world that ``settings`` name; ``stop`` them."""
    rllib = workers_config(config, settings, num_actions).env_runners(env_runner_cls=BankEnvRunner)
    assert settings.host is not None
    module = {
        "level": settings.host.level,
        "checkpoint": settings.host.checkpoint,
        "token_trains": settings.host.token_trains,
        "token_blocks": settings.host.token_blocks,
        "trust_remote_code": settings.host.trust_remote_code,
        "critic": False,
        "adapter_rank": None,
    }
    rllib.rl_module(rl_module_spec=RLModuleSpec(module_class=PolicyModule, model_config=module))
    return EnvRunnerGroup(config=rllib, local_env_runner=False)
