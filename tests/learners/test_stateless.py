"""Updates of a policy that reads one position: on shipped states, bounded by their exact KL, of the head alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from rl_tools import NUM_ACTIONS, Config, make_learner, make_runner, sample, update, weights_of, with_rewards

from latent_control import LatentActionLM
from latent_control.pretrained import load_policy
from learners.collate import collate
from learners.learner import PolicyLearner
from rollout_workers.generated_row import Row, joined
from rollout_workers.rollouts import Rollout

pytest_plugins = ("rl_fixtures",)

REWARDS = [0.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.25, 0.5, 0.0, 0.0, 1.0, 0.0, 2.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def checkpoint(tiny_base: Path, randomise: Callable[[LatentActionLM], LatentActionLM]) -> Path:
    """Eight codes and an MLP policy on ``tiny_base``."""
    shape = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_kind": "mlp", "policy_width": 16}
    model = randomise(LatentActionLM.from_base(tiny_base, num_actions=NUM_ACTIONS, seed=1, **shape))
    return model.save_pretrained(tiny_base.parent / "stateless")


@pytest.fixture(scope="module")
def rollouts(config: Config, checkpoint: Path) -> list[Rollout]:
    return with_rewards(sample(make_runner(config(), checkpoint)), REWARDS)


@pytest.fixture
def learner(config: Config, checkpoint: Path) -> Callable[..., PolicyLearner]:
    return lambda **improve: make_learner(config(improve={"gradient_clip": 1e9} | improve), checkpoint)


def test_workers_ship_the_states_of_choices_alone(rollouts: list[Rollout]) -> None:
    assert all(r.features is not None and r.features.shape == (len(r), 32) for r in rollouts)
    assert {len(r) for r in rollouts} != {len(r.prompt_tokens) + len(r) - 1 for r in rollouts}


def test_rows_alone_hold_what_whole_rows_hold(rollouts: list[Rollout]) -> None:
    whole, alone = collate([replace(r, features=None) for r in rollouts]), collate(rollouts, alone=True)
    for column in ("tokens", Columns.ACTIONS, Columns.ACTION_LOGP):
        assert torch.equal(whole[column][whole[Columns.LOSS_MASK]], alone[column][alone[Columns.LOSS_MASK]])
    assert alone["lengths"].tolist() == [len(r) for r in rollouts]
    assert alone["features"].shape == (*alone["tokens"].shape, 32)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "reinforce_pp"])
def test_an_update_on_shipped_states_is_that_on_recomputed_ones(
    learner: Callable[..., PolicyLearner], rollouts: list[Rollout], algorithm: str
) -> None:
    shipped, again = (learner(algorithm=algorithm, features=how, epochs=2) for how in ("ship", "recompute"))
    update(shipped, rollouts)
    update(again, [replace(r, features=None) for r in rollouts])
    before = load_policy(Path(shipped.module[DEFAULT_MODULE_ID].model_config["checkpoint"])).state_dict()
    for name, value in weights_of(shipped).items():
        np.testing.assert_allclose(value, weights_of(again)[name], atol=2e-4, err_msg=name)
        assert name.startswith("critic") or not np.array_equal(value, before[name].numpy()), f"{name} did not move"


def test_a_version_is_the_policy_and_nothing_of_the_base(learner: Callable[..., PolicyLearner]) -> None:
    """Norm 64, 32 x 16 + 16, twice (32 + 2 x 512 + 48), norm 32, 16 x 8: 2,960 numbers."""
    assert sum(array.size for array in weights_of(learner()).values()) == 64 + 528 + 2 * 1104 + 32 + 128


@torch.no_grad()
def moved(learner: PolicyLearner, checkpoint: Path, rollouts: list[Rollout]) -> float:
    """Mean exact KL(before || after) over the choices."""
    states = torch.cat([torch.from_numpy(r.features) for r in rollouts])
    before = torch.log_softmax(load_policy(checkpoint)(states), -1)
    after = torch.log_softmax(learner.module[DEFAULT_MODULE_ID].policy(states), -1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_steps_end_beyond_the_target(
    learner: Callable[..., PolicyLearner], checkpoint: Path, rollouts: list[Rollout]
) -> None:
    """With a bound, the step that crosses it is the last one; the logged KL is the exact one by hand."""
    free = learner(epochs=12, learning_rate=1e-3)
    update(free, rollouts)
    far = moved(free, checkpoint, rollouts)
    bounded = learner(epochs=12, learning_rate=1e-3, target_kl=far / 8)
    metrics = update(bounded, rollouts)
    near = moved(bounded, checkpoint, rollouts)
    assert far / 8 < near < far / 2
    assert metrics["kl_to_start"] == pytest.approx(near, rel=1e-3)
    assert 1 <= metrics["steps_taken"] < 12


def test_the_head_alone(learner: Callable[..., PolicyLearner], checkpoint: Path, rollouts: list[Rollout]) -> None:
    head = learner(trains="head")
    assert list(weights_of(head)) == ["head.weight"]
    update(head, rollouts)
    before = load_policy(checkpoint).state_dict()
    for name, value in head.module[DEFAULT_MODULE_ID].policy.state_dict().items():
        assert torch.equal(value, before[name]) != (name == "head.weight")


def test_an_episode_joins_the_states_of_its_turns() -> None:
    def turn(length: int, start: int) -> Row:
        counted = np.arange(start, start + length)
        return Row(
            tokens=counted.astype(np.int32), actions=counted.astype(np.int32), versions=np.zeros(length, np.int32),
            action_logp=np.zeros(length, np.float32), finish_reason="stop",
            features=np.repeat(counted[:, None], 3, 1).astype(np.float32),
        )  # fmt: skip

    row: Any = joined([turn(2, 10), turn(1, 20)], [[7, 7, 7]], "terminated")
    assert row.features[:, 0].tolist() == [10, 11, 0, 0, 0, 20] and row.generated.tolist() == [1, 1, 0, 0, 0, 1]
