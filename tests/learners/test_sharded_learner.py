"""Two learners that a policy is split over (FSDP2, gloo): the steps of one that has it whole, parts in memory, whole
states."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from ray import cloudpickle
from ray.rllib.core import DEFAULT_MODULE_ID
from rl_tools import NUM_ACTIONS, Config, make_learner, make_runner, sample, update, weights_of, with_rewards
from torch.distributed.tensor import DTensor

from configs.schema import RunConfig
from latent_control import LatentActionLM
from learners.sharded_learner import split_to
from rollout_workers.rollouts import Rollout

pytest_plugins = ("rl_fixtures",)
cloudpickle.register_pickle_by_value(sys.modules[__name__])

REWARDS = [0.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.25, 0.5, 0.0, 0.0, 1.0, 0.0, 2.0, 0.5, 1.0]
# A small gradient_clip and few microbatch_tokens matter; later updates are on the first policy's rollouts.
COMMON = {
    "shard": True,
    "epochs": 2,
    "gradient_clip": 0.05,
    "microbatch_tokens": 40,
    "learning_rate": 1e-3,
    "max_logp_mismatch": 100.0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks": ("latent", {"features": "recompute", "kl_coefficient": 0.1, "importance_cap": 2.0}),
    "blocks-target": ("latent", {"features": "ship", "target_kl": 10.0, "kl_coefficient": 0.1, "kl_in": "reward"}),
    "ppo": ("latent", {"algorithm": "ppo", "features": "recompute"}),
    "mlp": ("mlp", {"features": "recompute", "algorithm": "ppo"}),
    "token-last_blocks": ("token", {"features": "recompute", "kl_coefficient": 0.1}),
    **{
        f"token-{trains}": ("token", {"features": "recompute", "token_trains": trains})
        for trains in ("lora", "steering", "added_blocks", "mlp", "all")
    },
}


@ray.remote(num_cpus=0)
class Learner:
    """One of two processes, with one sharded learner after the other."""

    def join(self, rank: int, meeting: Path) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

    def build(self, config: RunConfig, checkpoint: Path, level: str) -> None:
        self.learner = make_learner(config, checkpoint, level)

    def update(self, rollouts: list[Rollout]) -> dict[str, float]:
        return update(self.learner, rollouts)

    def weights(self) -> dict[str, np.ndarray]:
        return weights_of(self.learner)

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(self.learner.get_state())

    def restore(self, state: dict[str, Any]) -> None:
        self.learner.set_state(state)

    def held(self) -> tuple[int, int]:
        """Numbers of policy, critic, reference and base that this process has; those there are."""
        module = self.learner.module[DEFAULT_MODULE_ID]
        connector = next(c for c in self.learner._learner_connector.connectors if hasattr(c, "base"))
        models = (module.policy, module.critic, self.learner.reference, connector.reference, connector.base)
        found = {id(p): p for model in models if model is not None for p in model.parameters()}.values()
        moments = [
            value
            for optimizer in self.learner._optimizer_parameters
            for moments in optimizer.state.values()
            for value in moments.values()
            if value.ndim
        ]
        parts = [*found, *moments]
        assert all(isinstance(p, DTensor) for p in parts)
        return sum(p.to_local().numel() for p in parts), sum(p.numel() for p in parts)


@pytest.fixture(scope="module")
def pair(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """``pair(method, arguments of the first, arguments of the second)``: what both answer."""
    actors = [Learner.remote() for _ in range(2)]
    meeting = tmp_path_factory.mktemp("meeting") / "point"

    def ask(method: str, *arguments: tuple[Any, ...]) -> list[Any]:
        each = arguments if len(arguments) == 2 else (arguments or ((),)) * 2
        return ray.get([getattr(a, method).remote(*one) for a, one in zip(actors, each, strict=True)], timeout=300)

    ask("join", (0, meeting), (1, meeting))
    yield ask
    for actor in actors:
        ray.kill(actor)


@pytest.fixture(scope="module")
def checkpoints_of(
    tiny_base: Path, tiny_checkpoint: Path, randomise: Callable[[LatentActionLM], LatentActionLM]
) -> dict[str, Path]:
    """By case's level; the second has an MLP policy."""
    shape = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_kind": "mlp", "policy_width": 16}
    model = randomise(LatentActionLM.from_base(tiny_base, num_actions=NUM_ACTIONS, seed=1, **shape))
    mlp = model.save_pretrained(tiny_base.parent / "sharded_mlp")
    return {"latent": tiny_checkpoint, "token": tiny_checkpoint, "mlp": mlp}


def cases(config: Config, checkpoints_of: dict[str, Path], name: str) -> tuple[RunConfig, RunConfig, Path, str]:
    """(whole, sharded, checkpoint, level)"""
    level, improve = CASES[name]
    sharded = config(improve=COMMON | improve, cluster={"num_learners": 2})
    whole = config(improve=COMMON | improve | {"shard": False})
    return whole, sharded, checkpoints_of[level], "token" if level == "token" else "latent"


@pytest.mark.parametrize("name", CASES)
def test_two_halves_take_the_steps_of_a_whole(
    pair: Callable[..., list[Any]], config: Config, checkpoints_of: dict[str, Path], name: str
) -> None:
    """Over three updates of two epochs; the first learner's rollouts are shorter, and some of them failed."""
    whole, sharded, checkpoint, level = cases(config, checkpoints_of, name)
    one = make_learner(whole, checkpoint, level)
    ships = CASES[name][1]["features"] == "ship"
    rewards: list[float | None] = [*REWARDS]
    rewards[2] = rewards[5] = None
    found = with_rewards(sample(make_runner(whole, checkpoint, level), ship_features=ships), rewards)
    rollouts = [shortened(r, 2) if i < 6 else r for i, r in enumerate(found)]
    start = weights_of(one)
    pair("build", (sharded, checkpoint, level))
    for _ in range(3):
        wanted = update(one, rollouts)
        metrics = pair("update", (rollouts[:8],), (rollouts[8:],))
        assert [m["steps_taken"] for m in metrics] == [wanted["steps_taken"]] * 2 == [2.0, 2.0]
        assert np.mean([m["policy_loss"] for m in metrics]) == pytest.approx(wanted["policy_loss"], abs=1e-5)
        norms = [m["gradients_default_optimizer_global_norm"] for m in metrics]
        assert norms == pytest.approx([wanted["gradients_default_optimizer_global_norm"]] * 2, rel=1e-4)
    weights, nothing = pair("weights")
    expected = weights_of(one)
    assert not nothing and weights.keys() == expected.keys()
    assert max(np.abs(expected[n] - start[n]).max() for n in start) > 1e-3, "nothing moved"
    assert max(np.abs(expected[n] - weights[n]).max() for n in weights) < 1e-5
    for held, there in pair("held"):
        assert held < 0.55 * there


def shortened(rollout: Rollout, length: int) -> Rollout:
    """The rollout's first ``length`` tokens."""
    parts = {name: getattr(rollout, name)[:length] for name in ("tokens", "actions", "action_logp")}
    shipped = rollout.features
    cut = None if shipped is None else shipped[: len(rollout.prompt_tokens) + length - 1]
    return replace(rollout, features=cut, **parts)


@pytest.mark.parametrize("name", ["ppo", "token-lora"])
def test_a_state_is_whole_and_goes_on_with_any_number_of_learners(
    pair: Callable[..., list[Any]], config: Config, checkpoints_of: dict[str, Path], name: str
) -> None:
    whole, sharded, checkpoint, level = cases(config, checkpoints_of, name)
    rollouts = with_rewards(sample(make_runner(whole, checkpoint, level), ship_features=False), REWARDS)
    parts = ((rollouts[:8],), (rollouts[8:],))
    pair("build", (sharded, checkpoint, level))
    pair("update", *parts)
    state, nothing = pair("state")
    assert not nothing
    one = make_learner(whole, checkpoint, level)
    one.set_state(copy.deepcopy(state))
    again = copy.deepcopy(one.get_state())
    pair("update", *parts)
    wanted, _ = pair("weights")
    update(one, rollouts)
    assert max(np.abs(wanted[n] - w).max() for n, w in weights_of(one).items()) < 1e-5
    for from_state in (state, again):  # of two learners and of one
        pair("build", (sharded, checkpoint, level))
        pair("restore", (from_state,))
        pair("update", *parts)
        found, _ = pair("weights")
        assert max(np.abs(wanted[n] - found[n]).max() for n in wanted) < 1e-6


def test_a_gradient_that_is_not_finite_on_one_keeps_both_from_the_step(
    pair: Callable[..., list[Any]], config: Config, checkpoints_of: dict[str, Path]
) -> None:
    whole, sharded, checkpoint, level = cases(config, checkpoints_of, "blocks")
    rollouts = with_rewards(sample(make_runner(whole, checkpoint, level), ship_features=False), REWARDS)
    broken = with_rewards(rollouts, [float("nan"), *REWARDS[1:]])
    pair("build", (sharded, checkpoint, level))
    before, _ = pair("weights")
    metrics = pair("update", (broken[:8],), (broken[8:],))
    assert [(m["update_broken"], m["steps_taken"]) for m in metrics] == [(1.0, 0.0)] * 2
    assert all(np.array_equal(before[n], w) for n, w in pair("weights")[0].items())
    metrics = pair("update", (rollouts[:8],), (rollouts[8:],))
    assert [m["steps_taken"] for m in metrics] == [2.0] * 2


def test_chunks_are_cut_until_there_are_enough() -> None:
    chunks = split_to([torch.arange(5), torch.tensor([5])], 4)
    assert sorted(i for chunk in chunks for i in chunk.tolist()) == list(range(6))
    assert sorted(map(len, chunks)) == [1, 1, 2, 2]
    assert split_to(chunks, 2) == chunks
