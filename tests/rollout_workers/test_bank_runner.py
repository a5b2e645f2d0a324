"""A worker of many policies, in this process: what is sampled together is what is sampled alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rl_tools import NUM_ACTIONS, rl_config

from configs.schema import RunConfig
from latent_control import LatentActionLM
from latent_control.pretrained import array_hash, load_policy, with_policy
from pipeline.rl.config import algorithm_config
from rollout_workers.bank_runner import BankEnvRunner, MemberFailed
from rollout_workers.engines.local import LocalEngine
from rollout_workers.engines.protocol import DecodeJob
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.model_host import MemberSettings
from rollout_workers.rollouts import HostSpec, PolicyVersion, Rollout, RolloutRequest

pytest_plugins = ("rl_fixtures",)

TASKS: dict[str, dict[str, Any]] = {
    "short": {"reward": {"weights": {"length": 1.0}}},
    "other": {"task": {"options": {"seed": 1}}, "reward": {"weights": {"stop": 1.0}}},
}


@pytest.fixture(scope="module")
def world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an ``mlp`` policy."""
    shape: dict[str, Any] = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_layers": 1}
    model = LatentActionLM.from_base(
        tiny_base, num_actions=NUM_ACTIONS, seed=1, policy_kind="mlp", policy_width=24, **shape
    )
    model.codebook.data *= 8
    for weight in model.merge.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(3))
    return model.save_pretrained(tmp_path_factory.mktemp("world") / "world")


def weights(world: Path, seed: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in load_policy(world).state_dict().items()}
    return {name: (0.4 * torch.randn(shape, generator=generator)).numpy() for name, shape in shapes.items()}


def settings_of(config: RunConfig, checkpoint: Path) -> Any:
    host = HostSpec(level="latent", checkpoint=str(checkpoint))
    return algorithm_config(config, host, num_actions=NUM_ACTIONS, reads="final", late_blocks=0, learning_rate=1e-3)


@pytest.fixture(scope="module")
def member(tiny_base: Path, world: Path) -> Callable[..., MemberSettings]:
    """``member("short")``: its settings, with changes of its task."""

    def make(name: str, **task: Any) -> MemberSettings:
        sections = {key: dict(value) for key, value in TASKS[name].items()}
        sections["task"] = {**sections.get("task", {}), **task}
        rllib = settings_of(rl_config(tiny_base, **sections), world)
        return MemberSettings(name=name, worker=rllib.env_config["worker"], module=rllib.rl_module_spec.model_config)

    return make


@pytest.fixture(scope="module")
def runner(tiny_base: Path, world: Path) -> BankEnvRunner:
    return BankEnvRunner(config=settings_of(rl_config(tiny_base), world), worker_index=0)


def asked(settings: MemberSettings, weights: dict[str, np.ndarray], **changes: Any) -> RolloutRequest:
    policy = PolicyVersion(version=3, weights_hash=array_hash(weights), weights=weights)
    request = RolloutRequest(
        request_id=0,
        split="train",
        prompt_indices=(0, 1, 2),
        seeds=(5,) * 3,
        group_size=4,
        policy=policy,
        ship_features=True,
        member=settings,
    )
    return replace(request, **changes)


def assert_same(found: list[Rollout], wanted: list[Rollout]) -> None:
    assert [r.rollout_id for r in found] == [r.rollout_id for r in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.actions.tolist() == other.actions.tolist()
        np.testing.assert_allclose(one.action_logp, other.action_logp, atol=1e-5)
        assert one.features is not None and other.features is not None
        np.testing.assert_allclose(one.features, other.features, atol=1e-5)
        for name in ("reward", "prompt_text", "policy_version", "policy_hash", "world_hash", "reward_hash", "seed"):
            assert getattr(one, name) == getattr(other, name), name


def test_rows_of_many_policies_in_one_batch_are_those_of_each_alone(
    runner: BankEnvRunner, member: Callable[..., MemberSettings], tiny_base: Path, world: Path, tmp_path: Path
) -> None:
    own = {"short": weights(world, 1), "other": weights(world, 2)}
    requests = [
        asked(member("short"), own["short"]),
        asked(member("other"), own["other"], prompt_indices=(7, 8, 9)),
        asked(member("short"), own["short"], prompt_indices=(3, 4, 5)),
        asked(member("other"), own["other"], temperature=0.0, group_size=1),  # not decoded like the others
    ]
    *together, answers = runner.sample_requests(requests)
    assert [summary.rollouts for summary, _ in answers] == [12, 12, 12, 3] == [len(rows) for rows in together]
    assert {summary.policies[0][1] for summary, _ in answers} == {array_hash(one) for one in own.values()}
    assert together[0][0].tokens.tolist() != together[1][0].tokens.tolist()
    for request, rollouts in zip(requests, together, strict=True):
        name = request.member.name
        checkpoint = tmp_path / f"{name}-{request.prompt_indices[0]}-{request.temperature}"
        with_policy(world, checkpoint, own[name])
        alone = LMEnvRunner(config=settings_of(rl_config(tiny_base, **TASKS[name]), checkpoint), worker_index=0)
        assert_same(rollouts, alone.sample(request=replace(request, member=None)))
    checked = [r for rows in together[:3] for r in rows if r.rescored_logp is not None]
    assert len(checked) == 3, "one of each request"
    for rollout in checked:
        np.testing.assert_allclose(rollout.rescored_logp, rollout.action_logp, atol=1e-4)


def test_new_weights_and_settings_are_taken_as_they_come(
    runner: BankEnvRunner, member: Callable[..., MemberSettings], world: Path
) -> None:
    first, second = weights(world, 1), weights(world, 4)
    before, _ = runner.sample_requests([asked(member("short"), first)])
    after, _ = runner.sample_requests([asked(member("short"), second)])
    again, _ = runner.sample_requests([asked(member("short"), first)])
    assert [r.tokens.tolist() for r in before] == [r.tokens.tolist() for r in again]
    assert [r.tokens.tolist() for r in before] != [r.tokens.tolist() for r in after]
    other, _ = runner.sample_requests([asked(member("short", options={"seed": 9}), first)])
    assert other[0].prompt_text != before[0].prompt_text


def test_what_goes_wrong_for_one_names_it(
    runner: BankEnvRunner, member: Callable[..., MemberSettings], world: Path
) -> None:
    own = weights(world, 1)
    with pytest.raises(MemberFailed, match=r"short: ValueError: prompt .* more than task.max_prompt_tokens=2"):
        runner.sample_requests([asked(member("other"), own), asked(member("short", max_prompt_tokens=2), own)])
    wrong = replace(asked(member("other"), own).policy, weights_hash="0" * 64)
    with pytest.raises(MemberFailed, match="other: ValueError: weights of policy version 3 arrived with hash"):
        runner.sample_requests([asked(member("short"), own), asked(member("other"), own, policy=wrong)])
    assert len(runner.sample_requests([asked(member("short"), own), asked(member("other"), own)])[0]) == 12


def test_a_batch_that_cannot_be_decoded_ends_for_the_one_whose_fault_it_is(
    runner: BankEnvRunner, member: Callable[..., MemberSettings], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, decode = weights(world, 1), LocalEngine.generate
    well = runner.sample_requests([asked(member("other"), own)])[0]

    def out_of_memory(engine: LocalEngine, job: DecodeJob) -> Any:
        if job.members is not None and runner.bank.blend("short") in job.members:
            raise RuntimeError("out of memory")
        return decode(engine, job)

    monkeypatch.setattr(LocalEngine, "generate", out_of_memory)
    with pytest.raises(MemberFailed, match="short: RuntimeError: out of memory"):
        runner.sample_requests([asked(member("other"), own), asked(member("short"), own)])
    assert_same(runner.sample_requests([asked(member("other"), own)])[0], well)
