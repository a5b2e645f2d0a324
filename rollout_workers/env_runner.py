"""The Ray actor that samples: RLlib's EnvRunner contract around a hosted language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import gymnasium as gym
import ray
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.framework import get_device
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED, NUM_ENV_STEPS_SAMPLED_LIFETIME, WEIGHTS_SEQ_NO
from ray.rllib.utils.typing import StateDict

from latent_control.decoding.prefix_tree import prompt_counts
from latent_control.pretrained import array_hash
from rollout_workers import telemetry
from rollout_workers.engines import DecodeJob, RolloutEngine, load_engine
from rollout_workers.episode_player import Player
from rollout_workers.gateway.player import GatewayPlayer
from rollout_workers.model_host import WorkerSettings
from rollout_workers.response_player import ResponsePlayer, player_for
from rollout_workers.rollout_record import Behaviour, rescored, rollouts_of, row_seeds, summary_of
from rollout_workers.rollouts import HostSpec, PolicyVersion, Rollout, RolloutRequest, RolloutSummary
from rollout_workers.tasks import Prompt, Score, build_task
from rollout_workers.tasks.rewards import reward_hash
from rollout_workers.weight_sync import Follower

T = TypeVar("T")


class LMEnvRunner(EnvRunner, Checkpointable):
    """Samples the rollouts that a ``RolloutRequest`` asks for, with exactly the policy version it names.

    Weights travel with the request, so a restarted or new worker can never serve with others than asked for.
    """

    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.settings: WorkerSettings = self.config.env_config["worker"]
        torch.set_num_threads(self.settings.rollout.torch_threads)
        self.device = torch.device(
            get_device(self.config, self.config.num_gpus_per_env_runner if self.worker_index else 0)
        )
        self.make_env()
        self.make_module()
        self.policy_version, self.policy_hash = -1, ""
        self.hashes: dict[int, str] = {}
        """Of the policy versions that had a part in the rollouts being sampled."""

    # -- RLlib's contract --------------------------------------------------------------------------------------------

    def make_env(self) -> None:
        """Load language model, tokenizer and task: what stands in for an environment."""
        self.task = build_task(self.settings.task)
        self.player = player_for(self.settings, self.task)
        self.reward_hash = reward_hash(self.settings.task, self.settings.reward)
        self.policy_dtype: torch.dtype = getattr(torch, self.settings.policy_dtype)
        self.hosted = self.settings.host
        self.engine = self._load(self.hosted) if self.hosted else None

    def _load(self, spec: HostSpec) -> RolloutEngine:
        return load_engine(spec, self.settings.rollout, device=self.device, policy_dtype=self.policy_dtype)

    def make_module(self) -> None:
        """Build the policy's RLModule, in the dtype it samples with, and let it steer the hosted model."""
        if self.engine is None:
            return
        spec = self.config.get_rl_module_spec(spaces=self.get_spaces(), inference_only=True)
        self.module = spec.build().to(self.device, self.policy_dtype).eval()
        self.engine.use(self.module.policy)

    def get_spaces(self) -> dict[str, tuple[gym.Space, gym.Space]]:
        """Observation and action space, of which RLlib needs the sizes only."""
        spaces = (self.config.observation_space, self.config.action_space)
        return {INPUT_ENV_SPACES: spaces, INPUT_ENV_SINGLE_SPACES: spaces, DEFAULT_MODULE_ID: spaces}

    def assert_healthy(self) -> None:
        """Raise unless the task is there."""
        assert self.task is not None

    def stop(self) -> None:
        """End the environments' processes; the model goes with this one."""
        self.player.close()

    def apply(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run ``func(self, ...)``; an exception reaches the driver as itself.

        RLlib's own version logs it, sleeps and exits the process, so the driver would only see a dead actor.
        """
        return func(self, *args, **kwargs)

    def get_metrics(self) -> dict[str, Any]:
        """RLlib's reduced metrics."""
        return self.metrics.reduce()

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> StateDict:
        """Policy weights and their version."""
        if not self._check_component(COMPONENT_RL_MODULE, components, not_components):
            return {WEIGHTS_SEQ_NO: self.policy_version}
        return {COMPONENT_RL_MODULE: self.module.get_state(**kwargs), WEIGHTS_SEQ_NO: self.policy_version}

    def set_state(self, state: StateDict) -> None:
        """RLlib's own way to push weights; requests bring theirs along, so only the weights are taken, no version is
        claimed."""
        if COMPONENT_RL_MODULE not in state:
            return
        weights = state[COMPONENT_RL_MODULE]
        weights = ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights
        self.module.set_state(weights.get(DEFAULT_MODULE_ID, weights))
        self.policy_version, self.policy_hash = -1, ""

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How to build this object again."""
        return (), {"config": self.config}

    def get_checkpointable_components(self) -> list[tuple[str, Checkpointable]]:
        """The policy."""
        return [(COMPONENT_RL_MODULE, self.module)]

    # -- sampling ----------------------------------------------------------------------------------------------------

    def sample(self, *, request: RolloutRequest, **_: Any) -> list[Rollout]:
        """The rollouts of ``request``, prompts outer, group inner.

        Raises:
            ValueError: a prompt is longer than ``task.max_prompt_tokens``, or the weights' hash is not the one
                announced.
        """
        engine = self._rehost(request.host or self.settings.host)
        if request.policy is not None:
            self._use(request.policy)
        self.hashes = {self.policy_version: self.policy_hash}
        prompts = [self.task.prompts(request.split)[index] for index in request.prompt_indices]
        limit = self.settings.rollout.max_new_tokens
        baselines = baselines_of(request, engine, self.player, prompts, limit)
        follow = None if request.board is None else Follower(request.board, self.policy_version, self._use)
        played = self.player.play(engine, prompts, replace(job_of(request, limit), refresh=follow))
        behaviour = Behaviour(
            version=self.policy_version, hashes=self.hashes, reward_hash=self.reward_hash, worker=self.worker_index
        )
        return rollouts_of(engine, request, played, behaviour, baselines)

    def sample_request(self, request: RolloutRequest) -> tuple[list[Rollout], tuple[RolloutSummary, dict[str, Any]]]:
        """``sample`` as two return values: the rollouts, of which the driver only holds the reference; a summary and
        metrics."""
        started = time.perf_counter()
        self.player.verifying.clear()
        engine = self._rehost(request.host or self.settings.host)
        before = prompt_counts(engine.tree)
        rollouts = self.sample(request=request)
        read, found = (now - then for now, then in zip(prompt_counts(engine.tree), before, strict=True))
        sampled = request.temperature > 0 and request.decode == "code"
        if request.policy is not None and sampled and self.engine is not None:
            rollouts = rescored(self.engine, request, rollouts, self.policy_version)
        seconds = time.perf_counter() - started
        summary = summary_of(
            request,
            rollouts,
            worker=self.worker_index,
            hashes=self.hashes,
            seconds=seconds,
            verifying=sum(self.player.verifying),
            prompt_tokens=(read, found),
        )
        return rollouts, (summary, self.counted(summary))

    def counted(self, summary: RolloutSummary) -> dict[str, Any]:
        """Count what was sampled for a request; RLlib's metrics of it."""
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED, summary.tokens, reduce="sum")
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED_LIFETIME, summary.tokens, reduce="lifetime_sum")
        worker = str(self.worker_index)
        telemetry.count("worker_rollouts_total", summary.rollouts, worker=worker)
        telemetry.count("worker_tokens_total", summary.tokens, worker=worker)
        telemetry.seconds("worker_request_seconds", summary.seconds, worker=worker)
        return self.get_metrics()

    def _rehost(self, wanted: HostSpec | None) -> RolloutEngine:
        """Host the model a request is for; evaluation asks for several in turn."""
        assert wanted is not None, "a worker without a model of its own needs requests that name theirs"
        if wanted != self.hosted:
            self.engine = None
            self.engine, self.hosted = self._load(wanted), wanted
        assert self.engine is not None
        return self.engine

    def _use(self, policy: PolicyVersion) -> None:
        """Load the weights of ``policy`` unless they are loaded."""
        if (policy.version, policy.weights_hash) == (self.policy_version, self.policy_hash):
            return
        self.module.set_state(weights_of(policy))
        assert self.engine is not None
        self.engine.use(self.module.policy)
        self.policy_version, self.policy_hash = policy.version, policy.weights_hash
        self.hashes[policy.version] = policy.weights_hash


def job_of(request: RolloutRequest, max_new_tokens: int) -> DecodeJob:
    """What is to be decoded for a request, but for its prompts."""
    return DecodeJob(
        prompts=(),
        repeats=request.group_size,
        seeds=row_seeds(request),
        max_new_tokens=max_new_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        keep_features=request.ship_features,
        aliases=request.aliases,
        decode=request.decode,
        mixture_codes=request.mixture_codes,
    )


def baselines_of(
    request: RolloutRequest,
    engine: RolloutEngine,
    player: Player | ResponsePlayer | GatewayPlayer,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> list[float | None]:
    """Reward of each prompt's greedy rollout with the engine's policy, where the request asks for it; ``None`` where it
    does not, or the verifier failed."""
    if not request.greedy_baseline:
        return [None] * len(prompts)
    seeds = (0,) * len(prompts)  # greedy decoding draws nothing
    job = DecodeJob(prompts=(), repeats=1, seeds=seeds, max_new_tokens=max_new_tokens, temperature=0.0)
    verdicts = [played.verdict for played in player.play(engine, prompts, job)]
    return [verdict.reward if isinstance(verdict, Score) else None for verdict in verdicts]


def weights_of(policy: PolicyVersion) -> Mapping[str, Any]:
    """The weights of a published policy; ``ValueError`` unless they have the hash that was announced."""
    weights: Mapping[str, Any] = (
        ray.get(policy.weights) if isinstance(policy.weights, ray.ObjectRef) else policy.weights
    )
    if (found := array_hash(weights)) != policy.weights_hash:
        raise ValueError(
            f"weights of policy version {policy.version} arrived with hash {found[:12]}, announced was "
            f"{policy.weights_hash[:12]}"
        )
    return weights


class NoRolloutWorker(EnvRunner):
    """In the place of the rollout workers of a run that samples with those of others: RLlib asks for the spaces."""

    def get_spaces(self) -> dict[str, tuple[gym.Space, gym.Space]]:
        """As of ``LMEnvRunner``."""
        spaces = (self.config.observation_space, self.config.action_space)
        return {INPUT_ENV_SPACES: spaces, INPUT_ENV_SINGLE_SPACES: spaces, DEFAULT_MODULE_ID: spaces}

    def set_state(self, state: StateDict) -> None:
        """Weights travel with requests."""

    def assert_healthy(self) -> None:
        """There is nothing to break."""

    def sample(self, **_: Any) -> list[Rollout]:
        """Nothing."""
        return []
