"""Agent programs through the gateway: the same episodes as by the built-in player, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rl_tools import NUM_ACTIONS, WIDTH, rl_config
from toy_world import WORDS

from configs.schema import Architecture, TaskConfig
from latent_control import LatentActionLM
from latent_control.pretrained import array_hash, read_shape
from learners.base_training import new_model, word_tokenizer
from pipeline.rl.config import algorithm_config
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.rollouts import HostSpec, PolicyVersion, Rollout, RolloutRequest
from rollout_workers.tasks import build_task

SUPPORT = Path(__file__).resolve().parents[2] / "support"
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }}</s> {% endfor %}{% if add_generation_prompt %}<s> "
    "assistant{% endif %}"
)
REQUEST = RolloutRequest(
    request_id=0, split="train", prompt_indices=(0, 1, 2, 3), seeds=(3,) * 4, group_size=4, ship_features=True,
    temperature=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, randomise: Callable[[LatentActionLM], LatentActionLM]
) -> Path:
    """Eight codes on a random base that knows the toy's words and a chat template."""
    folder = tmp_path_factory.mktemp("gateway")
    tokenizer = word_tokenizer((*WORDS, "user", "assistant"))
    tokenizer.chat_template = TEMPLATE
    shape = Architecture(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        new_model(shape, tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    layers = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_layers": 1}
    model = randomise(LatentActionLM.from_base(folder / "base", num_actions=NUM_ACTIONS, seed=1, **layers))
    model.codebook.data *= 8
    return model.save_pretrained(folder / "checkpoint")


def program(*arguments: str, file: str = "keys_agent.py", **options: Any) -> TaskConfig:
    """A task that plays a program of the tests."""
    return TaskConfig(
        name="gateway/keys",
        options={"program": str(SUPPORT / file), "arguments": list(arguments), "parallel": 4, **options},
    )


def worker(checkpoint: Path, task: TaskConfig, **turns: Any) -> LMEnvRunner:
    """A rollout worker in this process."""
    limits = {"max_turns": 4, "max_tokens": 120, **turns}
    config = rl_config(checkpoint.parent / "base", rollout={"max_new_tokens": 5, "turns": limits}, task=task)
    shape = read_shape(checkpoint)
    rllib = algorithm_config(
        config, HostSpec(level="latent", checkpoint=str(checkpoint)), num_actions=NUM_ACTIONS,
        reads=shape.policy_state, late_blocks=shape.late_blocks, learning_rate=1e-2, span=shape.span,
    )  # fmt: skip
    return LMEnvRunner(config=rllib, worker_index=0)


@pytest.fixture
def played(checkpoint: Path) -> Iterator[Callable[..., list[Rollout]]]:
    """``played(task, turns=..., **request)``: the rollouts of a worker that ends with the test."""
    workers = []

    def play(task: TaskConfig, turns: dict[str, Any] | None = None, **request: Any) -> list[Rollout]:
        workers.append(worker(checkpoint, task, **(turns or {})))
        return workers[-1].sample(request=replace(REQUEST, **request))

    yield play
    for one in workers:
        one.stop()


@pytest.mark.parametrize("way", ["text", "chat"])
def test_an_episode_is_the_one_that_the_built_in_player_plays(played: Callable[..., list[Rollout]], way: str) -> None:
    ours = played(TaskConfig(name="environment/toy_world:Keys", chat=way == "chat"))
    theirs = played(program(way))
    assert len(ours) == len(theirs) == 16 and len({len(one) for one in ours}) > 2
    assert not [one.failure for one in theirs if one.failure]
    for one, other in zip(ours, theirs, strict=True):
        for name in ("prompt_tokens", "tokens", "actions", "generated", "action_versions", "turn_rewards"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        np.testing.assert_allclose(one.action_logp, other.action_logp, atol=1e-4)
        np.testing.assert_allclose(one.features, other.features, atol=1e-4)
        assert (one.policy_version, one.text, one.prompt_text) == (other.policy_version, other.text, other.prompt_text)
        assert (one.reward, one.success) == (other.reward, other.success)
