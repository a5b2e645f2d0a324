"""What the tests of reinforcement learning share: a task that chance solves, workers and learners in this process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.rllib.core import DEFAULT_MODULE_ID

from configs.schema import RunConfig
from latent_control.decoding.engine import Engine
from latent_control.pretrained import array_hash, read_shape
from latent_control.token_policy import Trains
from learners.learner import PolicyLearner
from pipeline.rl.config import algorithm_config
from pipeline.stages.improve import TOKEN_READS, hosted_as
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.response_player import player_for
from rollout_workers.rollouts import HostSpec, PolicyVersion, Rollout, RolloutRequest
from rollout_workers.tasks import Failure, Prompt, Score, Split
from rollout_workers.tasks.countdown import Countdown
from rollout_workers.tasks.protocol import LazySequence
from rollout_workers.weight_sync import Follower

NUM_ACTIONS, WIDTH = 8, 32
# Ray workers do not find this file: they get its classes themselves.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

Config = Callable[..., RunConfig]


class EvenTask(Countdown):
    """Countdown's prompts cut to several lengths; the reward is the share of generated words that are even numbers."""

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Prompt i lacks i % 3 of its words: batches need padding."""
        whole = super().prompts(split)
        return LazySequence(len(whole), lambda i: replace(whole[i], text=" ".join(whole[i].text.split()[i % 3 :])))

    def score(self, prompt: Prompt, text: str) -> Score | Failure:  # type: ignore[override]
        """Fails to judge an empty text."""
        words = text.split()
        if not words:
            return Failure(kind="empty", message="nothing was generated")
        share = sum(word.isdigit() and int(word) % 2 == 0 for word in words) / len(words)
        return Score(reward=share, success=share == 1.0, parts={"words": float(len(words))})


class EvenRunner(LMEnvRunner):
    """A worker on ``EvenTask``."""

    def make_env(self) -> None:
        """As always, with the other verifier."""
        super().make_env()
        self.task = EvenTask()
        self.player = player_for(self.settings, self.task)


def slow_down(_: LMEnvRunner, seconds: float) -> None:
    """Let a worker that follows the policy board sleep so long at each token."""
    look = getattr(Follower, "look", Follower.__call__)

    def slowly(follower: Follower) -> int:
        time.sleep(seconds)
        version: int = look(follower)
        return version

    Follower.look, Follower.__call__ = look, slowly  # type: ignore[attr-defined,method-assign]


def mix_up(_: LMEnvRunner) -> None:
    """Make a worker's engine feed each row its neighbour's token, at every third step."""
    choose = Engine._choose

    def faulty(engine: Engine, slots: list[int], *rest: Any) -> None:
        choose(engine, slots, *rest)
        if len(engine.chosen) % 3 == 0:
            engine.next_tokens = engine.next_tokens.roll(1)

    Engine._choose = faulty  # type: ignore[method-assign]


def rl_config(
    base: Path, *, improve: dict[str, Any] | None = None, rollout: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    """A small config: 4 prompts x 4 rollouts of up to 6 tokens."""
    cluster = {"learner_threads": 1, **sections.pop("cluster", {})}
    return RunConfig(
        base={"model": str(base)},
        improve={"prompts_per_update": 4, "group_size": 4, "learning_rate": 1e-2, **(improve or {})},
        rollout={"num_workers": 2, "max_new_tokens": 6, **(rollout or {})},
        cluster=cluster,
        **sections,
    )


def host_of(checkpoint: Path, level: str = "latent", trains: Trains = "last_blocks") -> HostSpec:
    """The policy of ``level`` on a checkpoint; the token level trains one block."""
    if level == "latent":
        return HostSpec(level="latent", checkpoint=str(checkpoint))
    return HostSpec(level="token", checkpoint=str(checkpoint.parent / "base"), token_trains=trains, token_blocks=1)


def rllib_config(config: RunConfig, host: HostSpec) -> Any:
    """RLlib's config with ``EvenRunner`` as worker."""
    assert config.improve is not None
    latent = host.level == "latent"
    reads = read_shape(Path(host.checkpoint)).policy_state if latent else TOKEN_READS[host.token_trains]
    actions = NUM_ACTIONS if latent else 2
    rate, late_blocks = config.improve.learning_rate, 1 if reads == "late" else 0
    rllib = algorithm_config(
        config, host, num_actions=actions, reads=reads, late_blocks=late_blocks, learning_rate=rate
    )
    return rllib.env_runners(env_runner_cls=EvenRunner)


def make_learner(config: RunConfig, checkpoint: Path, level: str = "latent") -> PolicyLearner:
    """A learner in this process, without Ray."""
    assert config.improve is not None
    rllib = rllib_config(config, host_of(checkpoint, level, hosted_as(config.improve.token_trains)))
    spaces = (rllib.observation_space, rllib.action_space)
    return rllib.build_learner(spaces={DEFAULT_MODULE_ID: spaces})


def make_runner(config: RunConfig, checkpoint: Path, level: str = "latent") -> EvenRunner:
    """A rollout worker in this process, without Ray."""
    assert config.improve is not None
    return EvenRunner(
        config=rllib_config(config, host_of(checkpoint, level, hosted_as(config.improve.token_trains))), worker_index=0
    )


def weights_of(learner: PolicyLearner) -> dict[str, Any]:
    """A copy of the learner's trained tensors as arrays."""
    return learner.module[DEFAULT_MODULE_ID].get_state()


def sample(runner: LMEnvRunner, learner: PolicyLearner | None = None, **changes: Any) -> list[Rollout]:
    """Four groups of four rollouts, with the learner's weights when one is given."""
    policy = None
    if learner is not None:
        weights = learner.module[DEFAULT_MODULE_ID].get_state(inference_only=True)
        policy = PolicyVersion(version=0, weights_hash=array_hash(weights), weights=weights)
    asked = RolloutRequest(
        request_id=0,
        split="train",
        prompt_indices=(0, 1, 2, 3),
        seeds=(3,) * 4,
        group_size=4,
        policy=policy,
        ship_features=True,
    )
    return runner.sample(request=replace(asked, **changes))


def with_rewards(rollouts: Sequence[Rollout], rewards: Sequence[float | None]) -> list[Rollout]:
    """The rollouts with other rewards; ``None`` is a failed verifier."""
    return [replace(r, reward=reward) for r, reward in zip(rollouts, rewards, strict=True)]


def update(learner: PolicyLearner, rollouts: Sequence[Rollout], **arguments: Any) -> dict[str, float]:
    """One update as the pipeline asks for it; its metrics as numbers."""
    improve = learner.improve
    size = -(-len(rollouts) // improve.minibatches)
    results = learner.update(
        episodes=list(rollouts),
        num_epochs=improve.epochs,
        minibatch_size=size,
        num_total_minibatches=improve.epochs * improve.minibatches,
        shuffle_batch_per_epoch=improve.minibatches > 1,
        **arguments,
    )
    return {name: float(value.peek()) for name, value in results[DEFAULT_MODULE_ID].items()}
