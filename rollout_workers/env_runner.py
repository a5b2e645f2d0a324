"""The Ray actor that samples: RLlib's EnvRunner contract around a hosted language model."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import psutil
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

from latent_control.distributions import rollout_seed
from latent_control.pretrained import array_hash
from latent_control.text import whole_characters
from rollout_workers.engines import DecodeJob, RolloutEngine, load_engine
from rollout_workers.environments.client import Worlds
from rollout_workers.episode_player import Played, Player
from rollout_workers.generated_row import row_of
from rollout_workers.model_host import WorkerSettings
from rollout_workers.rollouts import HostSpec, PolicyVersion, Rollout, RolloutRequest, RolloutSummary
from rollout_workers.tasks import AgentTask, Failure, Prompt, Score, build_task
from rollout_workers.tasks.encoding import decode_response, encode_prompt
from rollout_workers.tasks.rewards import Response, judge_all, reward_hash
from rollout_workers.weight_sync import Follower

RESCORED_SHARE = 1 / 32
"""Of the rollouts of a request, at least one: scored again when finished, so that a run sees an engine that mixes rows
up."""

T = TypeVar("T")
Play = Callable[[RolloutEngine, Sequence[Prompt], DecodeJob], list[Played]]


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
        self.player = self._player(self.task) if isinstance(self.task, AgentTask) else None
        self.reward_hash = reward_hash(self.settings.task, self.settings.reward)
        self.policy_dtype: torch.dtype = getattr(torch, self.settings.policy_dtype)
        self.hosted = self.settings.host
        self.engine = self._load(self.hosted) if self.hosted else None

    def _load(self, spec: HostSpec) -> RolloutEngine:
        return load_engine(spec, self.settings.rollout, device=self.device, policy_dtype=self.policy_dtype)

    def _player(self, task: AgentTask) -> Player:
        """What plays an environment's episodes, in child processes of this worker."""
        turns, about = self.settings.rollout.turns, self.settings.task
        worlds = Worlds(
            about.name,
            task.options,
            processes=turns.processes,
            step_seconds=turns.step_timeout_seconds,
            reset_seconds=turns.reset_timeout_seconds,
        )
        return Player(
            task=task,
            worlds=worlds,
            limits=turns,
            reward=self.settings.reward,
            chat=about.chat,
            max_prompt_tokens=about.max_prompt_tokens,
        )

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
        if self.player is not None:
            self.player.worlds.close()

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

        Raises: ValueError: a prompt is longer than ``task.max_prompt_tokens``, or the weights' hash is not the one
            announced.
        """
        engine = self._rehost(request.host or self.settings.host)
        if request.policy is not None:
            self._use(request.policy)
        self.hashes = {self.policy_version: self.policy_hash}
        prompts = [self.task.prompts(request.split)[index] for index in request.prompt_indices]
        streams = list(zip(request.seeds, request.prompt_indices, strict=True))
        seeds = [rollout_seed(seed, index, place) for seed, index in streams for place in range(request.group_size)]
        play = self._answers if self.player is None else self.player.play
        baselines = self._baselines(play, engine, prompts) if request.greedy_baseline else [None] * len(prompts)
        job = DecodeJob(
            prompts=(),
            repeats=request.group_size,
            seeds=tuple(seeds),
            max_new_tokens=self.settings.rollout.max_new_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            keep_features=request.ship_features,
            aliases=request.aliases,
            refresh=None if request.board is None else Follower(request.board, self.policy_version, self._use),
        )
        played = play(engine, prompts, job)
        return [
            self._rollout(engine, request, one, number, seeds[number], baselines[number // request.group_size])
            for number, one in enumerate(played)
        ]

    def _answers(self, engine: RolloutEngine, prompts: Sequence[Prompt], job: DecodeJob) -> list[Played]:
        """``job.repeats`` single responses to each prompt, judged."""
        encoded = [self._encode(engine, prompt) for prompt in prompts]
        generation = engine.generate(replace(job, prompts=tuple(encoded)))
        places = [place for place in range(len(prompts)) for _ in range(job.repeats)]
        rows = [row_of(generation, number) for number in range(len(places))]
        texts = [decode_response(engine.tokenizer, row.tokens.tolist()) for row in rows]
        limit = self.settings.rollout.max_new_tokens
        responses = [
            Response(text=text, new_tokens=len(row), limit=limit, stopped=row.finish_reason == "stop")
            for row, text in zip(rows, texts, strict=True)
        ]
        verdicts = judge_all(self.task, self.settings.reward, [prompts[place] for place in places], responses)
        return [
            Played(prompt=prompts[place], prompt_ids=encoded[place], row=row, text=text, verdict=verdict)
            for place, row, text, verdict in zip(places, rows, texts, verdicts, strict=True)
        ]

    def _baselines(self, play: Play, engine: RolloutEngine, prompts: Sequence[Prompt]) -> list[float | None]:
        """Reward of each prompt's greedy rollout with the policy as loaded; ``None`` where the verifier failed."""
        seeds, limit = (0,) * len(prompts), self.settings.rollout.max_new_tokens  # greedy decoding draws nothing
        job = DecodeJob(prompts=(), repeats=1, seeds=seeds, max_new_tokens=limit, temperature=0.0)
        verdicts = [played.verdict for played in play(engine, prompts, job)]
        return [verdict.reward if isinstance(verdict, Score) else None for verdict in verdicts]

    def sample_request(self, request: RolloutRequest) -> tuple[list[Rollout], tuple[RolloutSummary, dict[str, Any]]]:
        """``sample`` as two return values: the rollouts, of which the driver only holds the reference; a summary and
        metrics."""
        started = time.perf_counter()
        rollouts = self._rescored(self.sample(request=request), request)
        tokens = sum(rollout.new_tokens for rollout in rollouts)
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED, tokens, reduce="sum")
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED_LIFETIME, tokens, reduce="lifetime_sum")
        summary = RolloutSummary(
            request_id=request.request_id,
            worker=self.worker_index,
            policies=self._policies(rollouts),
            rollouts=len(rollouts),
            tokens=tokens,
            failures=sum(r.failure is not None for r in rollouts),
            rewards=tuple(float("nan") if r.reward is None else r.reward for r in rollouts),
            successes=tuple(r.success for r in rollouts),
            seconds=time.perf_counter() - started,
            part_means=_part_means(rollouts),
            node=ray.get_runtime_context().get_node_id() if ray.is_initialized() else "",
            rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
            failure_kinds=tuple(
                {r.failure.partition(":")[0]: r.failure for r in rollouts if r.failure is not None}.values()
            ),
            gib=psutil.Process().memory_info().rss / 2**30,
            code_counts=_code_counts(rollouts),
        )
        return rollouts, (summary, self.get_metrics())

    def _rescored(self, rollouts: list[Rollout], request: RolloutRequest) -> list[Rollout]:
        """The rollouts, a few of them with the log-probabilities that the policy in use gives to what was written.

        Only actions that this very version chose can be scored again; in rollouts that changed policies these are the
        last ones.
        """
        if request.policy is None or request.temperature == 0 or self.engine is None:
            return rollouts
        draw = np.random.default_rng([abs(request.request_id), self.policy_version])
        numbers = sorted(draw.choice(len(rollouts), math.ceil(len(rollouts) * RESCORED_SHARE), replace=False).tolist())
        sample = [rollouts[number] for number in numbers]
        found = self.engine.rescore(sample, temperature=request.temperature, top_k=request.top_k)
        for number, rollout, logp in zip(numbers, sample, found or [], strict=bool(found)):
            versions = (
                rollout.action_versions
                if len(rollout.action_versions)
                else np.full(len(rollout), rollout.policy_version)
            )
            rollouts[number] = replace(
                rollout, rescored_logp=np.where(versions == self.policy_version, logp, np.float32(np.nan))
            )
        return rollouts

    def _policies(self, rollouts: Sequence[Rollout]) -> tuple[tuple[int, str, int], ...]:
        """(version, hash, actions) of every policy that chose an action of these rollouts."""
        counts: Counter[int] = Counter()
        for rollout in rollouts:
            mixed = rollout.action_versions[rollout.mask].tolist() if len(rollout.action_versions) else []
            counts.update(mixed or [rollout.policy_version] * rollout.new_tokens)
        return tuple((version, self.hashes[version], counts[version]) for version in sorted(counts))

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
        weights = ray.get(policy.weights) if isinstance(policy.weights, ray.ObjectRef) else policy.weights
        found = array_hash(weights)
        if found != policy.weights_hash:
            raise ValueError(
                f"weights of policy version {policy.version} arrived with hash {found[:12]}, announced was "
                f"{policy.weights_hash[:12]}"
            )
        self.module.set_state(weights)
        assert self.engine is not None
        self.engine.use(self.module.policy)
        self.policy_version, self.policy_hash = policy.version, policy.weights_hash
        self.hashes[policy.version] = policy.weights_hash

    def _encode(self, engine: RolloutEngine, prompt: Prompt) -> tuple[int, ...]:
        ids = encode_prompt(engine.tokenizer, prompt, chat=self.settings.task.chat)
        if len(ids) > self.settings.task.max_prompt_tokens:
            raise ValueError(
                f"prompt {prompt.id} has {len(ids)} tokens, more than "
                f"task.max_prompt_tokens={self.settings.task.max_prompt_tokens}: raise it or shorten the prompt"
            )
        return tuple(ids)

    def _rollout(
        self,
        engine: RolloutEngine,
        request: RolloutRequest,
        played: Played,
        number: int,
        seed: int,
        baseline: float | None,
    ) -> Rollout:
        """What was played as the record of the request's rollout ``number``."""
        row, verdict = played.row, played.verdict
        score = verdict if isinstance(verdict, Score) else None
        mixed = request.board is not None and row.versions[0] != row.versions[-1]
        version = int(row.versions[0]) if request.board is not None else self.policy_version
        # Seed, prompt and the policy asked for say which rollout this is: sampled again, however requests are cut, it
        # gets the same id.
        stream, asked = (
            request.seeds[number // request.group_size],
            request.policy.weights_hash[:8] if request.policy else "",
        )
        group = f"{request.split}-{stream}-{played.prompt.id}-{asked}"
        return Rollout(
            rollout_id=f"{group}-{number % request.group_size}",
            group_id=group,
            prompt_id=played.prompt.id,
            prompt_text=whole_characters(played.prompt.text),
            text=whole_characters(played.text),
            prompt_tokens=np.array(played.prompt_ids, np.int32),
            tokens=row.tokens,
            actions=row.actions,
            action_logp=row.action_logp,
            finish_reason=row.finish_reason,
            reward=score.reward if score else None,
            reward_parts=dict(score.parts) if score else {},
            success=score.success if score else False,
            failure=whole_characters(f"{verdict.kind}: {verdict.message}") if isinstance(verdict, Failure) else None,
            policy_version=version,
            policy_hash=self.hashes[version],
            world_hash=engine.world_hash,
            codebook_hash=engine.codebook_hash,
            level=engine.level,
            seed=seed,
            worker=self.worker_index,
            created=time.time(),
            reward_hash=self.reward_hash,
            action_versions=row.versions if mixed else np.empty(0, np.int32),
            generated=row.generated,
            turn_rewards=played.turn_rewards,
            baseline=baseline,
            event_logp=row.event_logp,
            events=row.events,
            features=row.features,
        )


def _code_counts(rollouts: Sequence[Rollout]) -> dict[int, int]:
    """How often each code was chosen."""
    codes = [r.actions[r.mask] for r in rollouts if r.level == "latent"]
    return (
        dict(zip(*(x.tolist() for x in np.unique(np.concatenate(codes), return_counts=True)), strict=True))
        if codes
        else {}
    )


def _part_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of the rollouts that were judged; all of them have the same parts."""
    judged = [r.reward_parts for r in rollouts if r.failure is None]
    return {name: sum(parts[name] for parts in judged) / len(judged) for name in judged[0]} if judged else {}
