"""Offline improvement: weights and losses by hand, features computed once, what the stage changes, resume, and that it
improves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rl_tools import Config, make_runner, sample

from configs.checks import cross_field_problems
from configs.schema import DataSource, ImproveOffline, RunConfig
from latent_control import LatentActionLM
from latent_control.losses import REGRESSION_WEIGHTS, weighted_regression
from latent_control.pretrained import world_hash
from learners.features import FeatureCache
from learners.improve_offline import ImproveOfflineStage
from learners.offline_training import TrainingStep
from pipeline.replay.dataset import HELDOUT, StoredRollouts, advantages, read_rollouts, rollout_batches
from pipeline.replay.writer import ReplayWriter
from pipeline.stages.offline_job import OfflineJob
from pipeline.stages.offline_work import work
from pipeline.storage import checkpoints

pytest_plugins = ("rl_fixtures",)


def test_weights_by_hand() -> None:
    gains = torch.tensor([0.3, -0.3, 3.0, 0.0])
    torch.testing.assert_close(
        REGRESSION_WEIGHTS["awr"](gains, 0.3, 20.0), torch.tensor([math.e, 1 / math.e, 20.0, 1.0])
    )
    assert REGRESSION_WEIGHTS["filtered"](gains, 0.3, 20.0).tolist() == [1, 0, 1, 0]


def test_regression_by_hand() -> None:
    log_probs = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    reference = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    loss, metrics = weighted_regression(
        log_probs,
        actions=torch.tensor([0, 1]),
        weights=torch.tensor([2.0, 1.0]),
        reference_log_probs=reference,
        kl_coefficient=0.1,
        positions=2.0,
    )
    kl = (0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2
    assert float(metrics["kl_to_reference"]) == pytest.approx(kl)
    assert float(loss) == pytest.approx((2 * math.log(4) + math.log(2)) / 2 + 0.1 * kl)
    assert float(metrics["action_nll"]) == pytest.approx((math.log(4) + math.log(2)) / 2)


@pytest.fixture(scope="module")
def replay(config: Config, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 prompts x 8 rollouts of the tiny checkpoint; the reward is the share of even numbers."""
    runner, folder = make_runner(config(), tiny_checkpoint), tmp_path_factory.mktemp("replay")
    writer = ReplayWriter(folder / "replay", 4096, "first")
    for update in range(12):
        prompts = tuple(range(4 * update, 4 * update + 4))
        writer.add(
            [
                replace(r, policy_version=update)
                for r in sample(runner, prompt_indices=prompts, request_id=4 * update, group_size=8)
            ]
        )
    writer.close()
    return folder


@pytest.fixture(scope="module")
def rollouts(replay: Path, tiny_checkpoint: Path) -> StoredRollouts:
    world = world_hash(LatentActionLM.from_pretrained(tiny_checkpoint))
    return read_rollouts([DataSource(kind="replay", path=str(replay))], world=world)


def test_advantages_by_hand(rollouts: StoredRollouts) -> None:
    prompts, rewards = np.array([0, 0, 1, 1, 1]), np.array([0.0, 1.0, 0.0, 0.0, 0.3])
    five = replace(rollouts.subset(np.arange(len(rollouts)) < 5), prompts=prompts, rewards=rewards)
    np.testing.assert_allclose(advantages(five, "prompt"), [-0.5, 0.5, -0.1, -0.1, 0.2])
    np.testing.assert_allclose(advantages(five, "all"), rewards - 0.26)


def test_batches_hold_each_code_at_the_token_it_produced(rollouts: StoredRollouts) -> None:
    batch = rollouts.batch([3, 40, 7], np.arange(len(rollouts)))
    assert batch.advantages.tolist() == [3, 40, 7] and batch.index.tolist() == [3, 40, 7]
    for place, i in enumerate((3, 40, 7)):
        made = batch.response_mask[place]
        assert batch.actions[place][made].tolist() == rollouts.actions[i].tolist()
        assert batch.input_ids[place][batch.attention_mask[place].bool()].tolist() == rollouts.ids[i].tolist()
        assert batch.input_ids[place][made].tolist() == rollouts.ids[i][-len(rollouts.actions[i]) :].tolist()


def test_two_workers_share_each_batch_of_one(rollouts: StoredRollouts) -> None:
    settings = ImproveOffline(batch_size=8)
    whole = rollout_batches(rollouts, settings, seed=4)
    next(whole)
    parts = [next(rollout_batches(rollouts, settings, seed=4, rank=rank, world=2, start=1)).index for rank in range(2)]
    assert torch.equal(torch.cat(parts), next(whole).index)


@pytest.mark.parametrize("megabytes", [10.0, 0.0, 0.004])
def test_cached_features_are_the_bases_and_computed_once(
    tiny_checkpoint: Path, rollouts: StoredRollouts, megabytes: float
) -> None:
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    cache = FeatureCache(model, megabytes)
    for rows in ([0, 5, 9], [9, 5, 1], [0, 1, 9]):
        batch = rollouts.batch(rows)
        with torch.no_grad():
            expected = model.features(batch.input_ids[:, :-1]).read("late")
        real = batch.attention_mask[:, 1:].bool()
        torch.testing.assert_close(cache(batch)[real], expected[real], rtol=1e-5, atol=1e-6)
    assert cache.computed == {10.0: 4, 0.0: 9}.get(megabytes, cache.computed)
    assert 4 <= cache.computed <= 9


def test_the_stages_loss_is_the_weighted_likelihood_of_the_codes(
    tiny_checkpoint: Path, rollouts: StoredRollouts
) -> None:
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    stage = ImproveOfflineStage(model, ImproveOffline(temperature=0.5), temperature=2.0)
    gains = advantages(rollouts, "prompt")
    batch = rollouts.batch([0, 1, 2], gains)
    positions = float(batch.response_mask[:, 1:].sum())
    step = TrainingStep(update=0, updates=1, positions=positions, generator=torch.Generator(), context=None)
    terms = []
    for i in range(3):
        ids = torch.from_numpy(rollouts.ids[i].astype(np.int64))[None]
        with torch.no_grad():
            policy = torch.log_softmax(model.policy_logits(model.features(ids))[0] / 2.0, -1)
        start = ids.shape[1] - len(rollouts.actions[i])
        terms += [
            -math.exp(gains[i] / 0.5) * float(policy[start - 1 + t, code]) for t, code in enumerate(rollouts.actions[i])
        ]
    loss, metrics = stage(batch, step)
    assert float(loss.detach()) == pytest.approx(sum(terms) / positions, rel=1e-4)
    assert float(metrics["kl_to_reference"]) == pytest.approx(0, abs=1e-6)


def job(tiny_base: Path, tiny_checkpoint: Path, replay: Path, where: Path, **changes: Any) -> OfflineJob:
    settings: dict[str, Any] = {
        "updates": 6,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "warmup_updates": 0,
        "checkpoint_every": 2,
    }
    section = ImproveOffline(**settings | {"data": [{"kind": "replay", "path": str(replay)}]} | changes)
    config = RunConfig(base={"model": str(tiny_base)}, improve_offline=section, seed=3)
    source = str(tiny_checkpoint)
    return OfflineJob(
        stage="improve_offline", config=config, settings=section, source=source, base="", checkpoints=str(where)
    )


@pytest.mark.parametrize("method", ["awr", "filtered"])
def test_only_the_policy_changes(
    tiny_base: Path, tiny_checkpoint: Path, replay: Path, tmp_path: Path, method: str
) -> None:
    one = job(tiny_base, tiny_checkpoint, replay, tmp_path, method=method, heldout_share=0.3)
    seen: list[dict[str, float]] = []
    work(one, lambda _, metrics: seen.append(metrics))
    before, after = (LatentActionLM.from_pretrained(folder).state_dict() for folder in (tiny_checkpoint, one.result))
    assert {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"policy"}
    assert checkpoints.read_info(one.result)[HELDOUT] == 0.3
    assert seen[-1]["kl_to_reference"] > 0 and 0 < seen[-1]["estimated_reward"] < 1 and seen[-1]["effective"] > 1


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def test_resumed_equals_uninterrupted(tiny_base: Path, tiny_checkpoint: Path, replay: Path, tmp_path: Path) -> None:
    """The reference policy of the KL term too: it is the one the stage began with, not the one it is resumed with."""
    whole, broken = (
        job(tiny_base, tiny_checkpoint, replay, tmp_path / name, kl_coefficient=0.5, microbatch_size=5)
        for name in ("whole", "broken")
    )
    losses: dict[str, list[float]] = {"whole": [], "rest": []}
    work(whole, lambda _, metrics: losses["whole"].append(metrics["loss"]))

    def interrupt(update: int, metrics: dict[str, float]) -> None:
        if update == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        work(broken, interrupt)
    work(broken, lambda _, metrics: losses["rest"].append(metrics["loss"]))
    assert losses["rest"] == losses["whole"][2:]
    files = [one.result / "latent_actions.safetensors" for one in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("method", ["awr", "filtered"])
def test_new_rollouts_of_the_result_earn_more(
    config: Config, tiny_base: Path, tiny_checkpoint: Path, replay: Path, tmp_path: Path, method: str
) -> None:
    one = job(tiny_base, tiny_checkpoint, replay, tmp_path, method=method, updates=60, batch_size=64, temperature=0.1)
    work(one, lambda *_: None)
    fresh: dict[str, Any] = {"prompt_indices": tuple(range(1000, 1032)), "seeds": (9,) * 32, "group_size": 8}
    rewards = {}
    for name, checkpoint in (("before", tiny_checkpoint), ("after", one.result)):
        found = sample(make_runner(config(), checkpoint), **fresh)
        rewards[name] = np.mean([r.reward for r in found if r.reward is not None])
    assert rewards["after"] > rewards["before"] + 0.05


def test_kl_holds_the_policy_where_it_was(tiny_base: Path, tiny_checkpoint: Path, replay: Path, tmp_path: Path) -> None:
    last = {}
    for coefficient in (0.0, 10.0):
        seen: list[dict[str, float]] = []
        one = job(
            tiny_base, tiny_checkpoint, replay, tmp_path / str(coefficient), kl_coefficient=coefficient, updates=20
        )
        work(one, lambda _, metrics, seen=seen: seen.append(metrics))
        last[coefficient] = seen[-1]["kl_to_reference"]
    assert last[10.0] < 0.3 * last[0.0]


def test_nothing_to_filter_is_said(rollouts: StoredRollouts) -> None:
    flat = replace(rollouts, rewards=np.ones(len(rollouts)))
    with pytest.raises(ValueError, match="no rollout is better than its baseline"):
        next(rollout_batches(flat, ImproveOffline(method="filtered"), seed=0))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"data": [{"kind": "task"}]}, "improve_offline.data[0].kind: task has no rewards"),
        ({}, "improve_offline.data: an empty list; write e.g. [{kind: replay"),
        ({"data": [{"kind": "replay", "path": "x"}], "shard": True}, "improve_offline.shard"),
        (
            {"data": [{"kind": "replay", "path": "x"}], "policy_versions": [5, 2]},
            "improve_offline.policy_versions: [5, 2]",
        ),
    ],
)
def test_contradictions_are_named(section: dict[str, Any], message: str) -> None:
    config = RunConfig(base={"model": "x"}, actions={"init": "y"}, improve_offline=section)
    assert [m for m in cross_field_problems(config) if m.startswith(message)]


def test_the_stage_needs_a_policy() -> None:
    config = RunConfig(base={"model": "x"}, improve_offline={"data": [{"kind": "replay", "path": "x"}]})
    assert any(m.startswith("improve_offline: needs latent actions") for m in cross_field_problems(config))
