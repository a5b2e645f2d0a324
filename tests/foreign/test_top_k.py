"""Top-k sampling: ratios are over the actions that could be sampled, so their mean is 1, wherever they are formed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from rl_tools import Config, make_learner, make_runner, sample, update, with_rewards

from configs.schema import DataSource
from latent_control import LatentActionLM
from latent_control.analysis.measures import rollout_logp
from latent_control.distributions import action_log_probs, likeliest
from latent_control.losses import clipped_surrogate
from learners.collate import collate, support_at
from pipeline.integrity.reproduce import _rollout
from pipeline.replay.dataset import read_rollouts
from pipeline.replay.reader import ReplayReader
from pipeline.replay.writer import ReplayWriter

pytest_plugins = ("rl_fixtures",)
TOP_K = 3
REWARDS = [0.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.25, 0.5, 0.0, 0.0, 1.0, 0.0, 2.0, 0.5, 1.0]


@pytest.mark.parametrize("top_k", [1, 2, 5, 15])
@pytest.mark.parametrize("seed", range(5))
def test_the_mean_ratio_is_one_over_what_could_be_sampled(top_k: int, seed: int) -> None:
    """All actions of the behaviour's set, each weighed by its probability; the newer policy prefers others."""
    generator = torch.Generator().manual_seed(seed)
    older, newer = torch.randn(2, 1, 16, generator=generator) * 3
    support = likeliest(older, top_k)
    assert support is not None
    behaviour = action_log_probs(older, temperature=0.8, top_k=top_k)
    actions = support[0]
    rows = support.expand(top_k, -1)
    chances = behaviour[0, actions]
    _, metrics = clipped_surrogate(
        action_log_probs(newer.expand(top_k, -1), temperature=0.8, top_k=top_k, support=rows, keep=actions),
        actions=actions,
        action_logp=chances,
        advantages=torch.ones(top_k),
        weights=chances.exp(),
        clip_low=0.2,
        clip_high=0.2,
    )
    assert float(metrics["ratio_mean"]) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("level", ["latent", "token"])
@pytest.mark.parametrize("improve", [{}, {"importance_cap": 2.0}])
def test_the_learner_normalises_over_the_set_that_the_worker_stored(
    level: str, improve: dict[str, object], config: Config, tiny_checkpoint: Path
) -> None:
    """Steps of one update move the policy; the ratio of every action that could have been taken still sums to 1."""
    settings = config(improve={"learning_rate": 0.05, "gradient_clip": 1e9, **improve}, rollout={"top_k": TOP_K})
    learner = make_learner(settings, tiny_checkpoint, level)
    rollouts = with_rewards(sample(make_runner(settings, tiny_checkpoint, level), learner, top_k=TOP_K), REWARDS)
    assert all(r.support.shape == (len(r), TOP_K) and r.support.dtype == np.int32 for r in rollouts)
    assert all((r.support == r.actions[:, None]).any(1).all() for r in rollouts)
    first = update(learner, rollouts)
    assert first["logp_gap"] < 1e-4, "before the first step both are one policy"
    later = update(learner, rollouts)
    assert later["logp_gap"] > 0.01, "the policy has moved"
    batch = collate(rollouts)
    support, mask = support_at(batch), batch[Columns.LOSS_MASK]
    assert support is not None and support.shape == (int(mask.sum()), TOP_K)
    policy = learner.module[DEFAULT_MODULE_ID].unwrapped().policy
    logits = policy.head(policy.hidden(batch["features"])[mask])
    chances = action_log_probs(logits, top_k=TOP_K, support=support).exp().gather(1, support).sum(1)
    assert torch.allclose(chances, torch.ones_like(chances), atol=1e-5)


def test_stored_sets_come_back_and_weigh_rollouts(config: Config, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The replay buffer keeps the sets; another policy gives a code the probability it would sample it with, which is 0
    outside of its own top k."""
    settings = config(rollout={"top_k": TOP_K})
    rollouts = with_rewards(sample(make_runner(settings, tiny_checkpoint), top_k=TOP_K), REWARDS)
    writer = ReplayWriter(tmp_path / "replay", 8, "a")
    writer.add(rollouts)
    writer.close()
    rows = {row["rollout_id"]: row for row in ReplayReader(tmp_path / "replay", shuffle=False).rows()}
    for rollout in rollouts:
        assert np.array_equal(_rollout(rows[rollout.rollout_id]).support, rollout.support)

    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    stored = read_rollouts([DataSource(kind="replay", path=str(tmp_path / "replay"))], world=rollouts[0].world_hash)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for row in range(len(stored)):
        batch = stored.batch([row])
        found = float(rollout_logp(model, batch, top_k=TOP_K)[0])
        logits = model.policy_logits(model.features(batch.input_ids))[0, :-1][batch.response_mask[0, 1:]].detach()
        wanted = 0.0
        for code, some in zip(stored.actions[row].tolist(), logits, strict=True):
            kept, among = some.topk(TOP_K)
            wanted += float(torch.log_softmax(kept, 0)[among == code]) if code in among else -math.inf
        assert found == pytest.approx(wanted, abs=1e-4)


def test_without_top_k_nothing_is_stored(config: Config, tiny_checkpoint: Path) -> None:
    rollouts = sample(make_runner(config(), tiny_checkpoint))
    assert all(not len(r.support) for r in rollouts) and "support" not in collate(rollouts)
