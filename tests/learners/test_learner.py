"""The learner, in this process: gradients by equivalence, what changes and what does not, agreement with the worker,
its state."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core import COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from rl_tools import (
    Config,
    EvenRunner,
    host_of,
    make_learner,
    make_runner,
    rllib_config,
    sample,
    update,
    weights_of,
    with_rewards,
)

from latent_control import LatentActionLM
from latent_control.algorithms import ALGORITHMS
from latent_control.decoder_stack import DecoderStack
from latent_control.distributions import action_log_probs
from latent_control.pretrained import array_hash
from learners.collate import Places, collate, group_size
from learners.learner import PolicyLearner, constant_scale, microbatches, position_weights
from learners.rl_module import build_policy
from learners.settings import KEY
from pipeline.storage import checkpoints
from rollout_workers import env_runner
from rollout_workers.rollouts import PolicyVersion, Rollout, RolloutRequest

pytest_plugins = ("rl_fixtures",)

REWARDS = [0.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.25, 0.5, 0.0, 0.0, 1.0, 0.0, 2.0, 0.5, 1.0]
FREE = {"gradient_clip": 1e9}  # clipping would hide differences


def shortened(rollout: Rollout, length: int) -> Rollout:
    """The rollout's first ``length`` tokens."""
    assert rollout.features is not None
    parts = {name: getattr(rollout, name)[:length] for name in ("tokens", "actions", "action_logp")}
    return replace(rollout, features=rollout.features[: len(rollout.prompt_tokens) + length - 1], **parts)


@pytest.fixture(scope="module")
def rollouts(config: Config, tiny_checkpoint: Path) -> list[Rollout]:
    """Four groups of four, of all lengths from 1 to 6, with rewards that differ within each group."""
    found = sample(make_runner(config(), tiny_checkpoint))
    cut = [shortened(r, min(len(r), 1 + i % 6)) for i, r in enumerate(found)]
    return with_rewards(cut, REWARDS)


@pytest.fixture
def learner(config: Config, tiny_checkpoint: Path) -> Callable[..., PolicyLearner]:
    """``learner(level=..., rollout={...}, **improve settings)``."""

    def build(level: str = "latent", rollout: dict[str, Any] | None = None, **improve: Any) -> PolicyLearner:
        return make_learner(config(improve=improve, rollout=rollout), tiny_checkpoint, level)

    return build


Learners = Callable[..., PolicyLearner]


def latent_policy(checkpoint: Path) -> DecoderStack:
    policy = build_policy(
        level="latent", checkpoint=str(checkpoint), token_trains="all", token_blocks=0, trust_remote_code=False
    )
    assert isinstance(policy, DecoderStack)
    return policy


def gradient(learner: PolicyLearner, rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
    """The gradient that one update on ``rollouts`` used."""
    update(learner, rollouts)
    return {name: p.grad.clone() for name, p in learner.module[DEFAULT_MODULE_ID].trained().items()}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    size = max(float(g.abs().max()) for g in wanted.values())
    assert size > 1e-4, "nothing to compare"
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) <= tolerance * size, name


# -- weights and pieces ------------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])


def test_token_mean_weighs_tokens_equally() -> None:
    weights = position_weights(MASK, "token")
    assert weights.tolist() == [[pytest.approx(1 / 3)] * 2 + [0.0], [0.0, pytest.approx(1 / 3), 0.0], [0.0, 0.0, 0.0]]


def test_sequence_mean_weighs_sequences_equally_and_leaves_empty_ones_out() -> None:
    assert position_weights(MASK, "sequence").tolist() == [[0.25, 0.25, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_nothing_to_weigh_is_zero(loss_mean: str) -> None:
    assert not position_weights(torch.zeros(2, 3, dtype=torch.bool), loss_mean).any()


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_shares_of_two_learners_average_to_those_of_one(loss_mean: str) -> None:
    """The second learner has a third of the tokens; a plain mean of both means would give each of them twice the
    weight."""
    whole = torch.tensor([[True, True], [True, False], [True, False], [False, False]])
    counts = {"token": 2.0, "sequence": 1.5}
    parts = [position_weights(part, loss_mean, lambda _: torch.tensor(counts[loss_mean])) for part in whole.split(2)]
    assert torch.allclose(torch.cat(parts) / 2, position_weights(whole, loss_mean))


def test_a_constant_mean_divides_the_sum_by_rollouts_times_the_longest() -> None:
    """Three positions of two rollouts (the third has none) of up to 6 tokens: each counts 1/12, 4 times less than in
    the mean."""
    assert position_weights(MASK, "constant").tolist() == position_weights(MASK, "token").tolist()
    assert float(constant_scale(MASK, 6)) == pytest.approx(0.25)
    assert float(constant_scale(torch.zeros(2, 3, dtype=torch.bool), 6)) == 0.0


def test_constant_shares_of_two_learners_average_to_those_of_one() -> None:
    """Two and one rollouts with 3 and 1 positions of up to 4: each position counts 1/12 of the whole."""
    whole = torch.tensor([[True, True], [True, False], [True, False], [False, False]])
    means = iter([1.5, 2.0, 1.5, 2.0])  # rollouts and positions, as both learners are told
    for part in whole.split(2):
        weights = position_weights(part, "token", lambda _: torch.tensor(2.0))
        scale = constant_scale(part, 4, lambda _: torch.tensor(next(means)))
        # Each counts 1 / 12 in the end: DDP halves what two learners have.
        assert torch.allclose(weights[part] * scale / 2, torch.tensor(1 / 12))


def test_microbatches_hold_every_row_once_under_the_limit() -> None:
    lengths = torch.tensor([3, 9, 1, 4, 4, 12, 2])
    chunks = microbatches(lengths, 12)
    assert sorted(i for chunk in chunks for i in chunk.tolist()) == list(range(7))
    assert all(len(chunk) == 1 or len(chunk) * int(lengths[chunk].max()) <= 12 for chunk in chunks)
    assert [len(chunk) for chunk in chunks] == [1, 1, 3, 2]


def test_microbatches_end_where_padding_would_cost_more_than_another_pass() -> None:
    lengths = torch.tensor([100] * 10 + [20] * 10 + [95] * 10 + [60] * 10)
    chunks = [lengths[chunk].tolist() for chunk in microbatches(lengths, 10_000)]
    assert sorted(x for chunk in chunks for x in chunk) == sorted(lengths.tolist())
    assert all(max(chunk) * len(chunk) <= max(512, 1.1 * sum(chunk)) for chunk in chunks)
    # The next row would have been too much: nothing is cut without need.
    whole = [[*chunk, later[0]] for chunk, later in pairwise(chunks)]
    assert all(max(chunk) * len(chunk) > max(512, 1.1 * sum(chunk)) for chunk in whole) and len(chunks) == 3
    assert len(microbatches(torch.tensor([50, 30, 10, 5]), 10_000)) == 1, "200 padded tokens are one pass"


def test_a_row_longer_than_the_limit_goes_alone() -> None:
    assert [chunk.tolist() for chunk in microbatches(torch.tensor([5, 50, 5]), 10)] == [[1], [0, 2]]


def toy(**changes: Any) -> Rollout:
    values: dict[str, Any] = dict.fromkeys(Rollout.__dataclass_fields__, "")
    values |= {"group_id": "g", "prompt_tokens": np.array([1, 5, 6], np.int32), "tokens": np.array([7, 8], np.int32)}
    values |= {"actions": np.array([3, 4], np.int32), "action_logp": np.array([-0.5, -1.5], np.float32), "reward": 1.0}
    return Rollout(**values | dict.fromkeys(("features", "events", "event_logp", "rescored_logp")) | changes)


def test_collate_puts_an_action_where_it_was_taken() -> None:
    tokens, actions = np.array([9, 2, 3], np.int32), np.array([0, 1, 2], np.int32)
    nothing = np.zeros(3, np.float32)
    other = toy(prompt_tokens=np.array([1], np.int32), tokens=tokens, actions=actions, action_logp=nothing, reward=0.0)
    batch = collate([toy(), other])
    assert batch["tokens"].tolist() == [[1, 5, 6, 7], [1, 9, 2, 0]]
    assert batch[Columns.ACTIONS].tolist() == [[0, 0, 3, 4], [0, 1, 2, 0]]
    assert batch[Columns.ACTION_LOGP].tolist() == [[0.0, 0.0, -0.5, -1.5], [0.0, 0.0, 0.0, 0.0]]
    assert batch[Columns.LOSS_MASK].tolist() == [[False, False, True, True], [True, True, True, False]]
    assert batch["lengths"].tolist() == [4, 3]


def test_collate_trains_where_a_span_begins() -> None:
    long = toy(
        tokens=np.arange(5, dtype=np.int32),
        actions=np.array([3, 3, 4, 4, 6], np.int32),
        action_logp=np.zeros(5, np.float32),
    )
    batch = collate([long, toy()], 2)
    assert batch[Columns.LOSS_MASK].int().tolist() == [[0, 0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0]]
    assert batch[Columns.ACTIONS][0].tolist() == [0, 0, 3, 3, 4, 4, 6]


def test_places_gather_actions_and_spread_them_again() -> None:
    mask = torch.tensor([[False, True, False, True], [False, True, False, False], [False] * 4])
    places, values = Places(mask), torch.arange(12.0).view(3, 4)
    assert places.taken.tolist() == [[True, True], [True, False], [False, False]]
    assert places.gather(values).tolist() == [[1.0, 3.0], [5.0, 0.0], [0.0, 0.0]]
    assert torch.equal(places.spread(places.gather(values)), values * mask)


def test_collate_masks_a_failed_rollout_whole() -> None:
    batch = collate([toy(), toy(reward=None), toy(reward=0.0)])
    assert batch[Columns.LOSS_MASK].sum(1).tolist() == [2, 0, 2]


def test_truncated_rollouts_can_be_left_out() -> None:
    ended = [toy(finish_reason=end) for end in ("stop", "length", "terminated", "token_limit")]
    assert collate(ended)[Columns.LOSS_MASK].sum(1).tolist() == [2, 2, 2, 2]
    assert collate(ended, mask_truncated=True)[Columns.LOSS_MASK].sum(1).tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("groups", ["aab", "aabbb", "abab"])
def test_broken_groups_are_refused(groups: str) -> None:
    with pytest.raises(AssertionError, match="broken groups"):
        group_size([toy(group_id=g) for g in groups])


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"loss_mean": "token"}, {"loss_mean": "sequence"}, {"loss_mean": "constant", "ratio": "sequence"}]
)
@pytest.mark.parametrize("tokens", [1, 40])
def test_microbatched_gradient_is_the_full_batch_gradient(
    learner: Learners, rollouts: list[Rollout], settings: dict[str, str], tokens: int
) -> None:
    whole = gradient(learner(**FREE, **settings), rollouts)
    assert_close(gradient(learner(**FREE, **settings, microbatch_tokens=tokens), rollouts), whole)


def test_token_and_sequence_mean_are_different_losses(learner: Learners, rollouts: list[Rollout]) -> None:
    token, sequence = (gradient(learner(**FREE, loss_mean=mean), rollouts) for mean in ("token", "sequence"))
    with pytest.raises(AssertionError):
        assert_close(token, sequence, 0.05)


def test_gradient_is_the_one_written_down(learner: Learners, rollouts: list[Rollout], tiny_checkpoint: Path) -> None:
    """The first update's gradient against d/dtheta of -sum of weight x advantage x log pi, row by row, without
    padding."""
    found = gradient(learner(**FREE, algorithm="rloo", loss_mean="sequence"), rollouts)
    policy = latent_policy(tiny_checkpoint)
    loss = torch.zeros(())
    for index, r in enumerate(rollouts):
        group = REWARDS[index // 4 * 4 : index // 4 * 4 + 4]
        advantage = REWARDS[index] - (sum(group) - REWARDS[index]) / 3
        logits = policy(torch.from_numpy(r.features.copy())[None])[0, len(r.prompt_tokens) - 1 :]
        logp = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(r.actions.astype(np.int64))[:, None])
        loss = loss - advantage * logp.mean() / 16
    loss.backward()
    assert_close(found, {name: p.grad for name, p in policy.named_parameters()}, 1e-5)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_algorithm_makes_good_actions_likelier(
    learner: Learners, rollouts: list[Rollout], algorithm: str
) -> None:
    """Log-probability of the rollouts with the most reward against that of the ones with the least, after a few
    updates."""
    scored = [replace(r, baseline=0.5) for r in rollouts]
    trained = learner(algorithm=algorithm, learning_rate=3e-3)

    def gap() -> float:
        batch = trained._learner_connector(episodes=scored, rl_module=None, batch={}, shared_data={}, metrics=None)[
            DEFAULT_MODULE_ID
        ]
        mask, policy = batch[Columns.LOSS_MASK], trained.module[DEFAULT_MODULE_ID].policy
        with torch.no_grad():
            logp = torch.log_softmax(policy(batch["features"]), -1).gather(-1, batch[Columns.ACTIONS][..., None])[
                ..., 0
            ]
        means = torch.stack([row[m].mean() for row, m in zip(logp, mask, strict=True)])
        rewards = torch.tensor(REWARDS)
        return float(means[rewards >= 1.0].mean() - means[rewards == 0.0].mean())

    before = gap()
    for _ in range(8):
        update(trained, scored)
    assert gap() > before + 0.05


def test_kl_in_the_reward_is_taken_off_each_action(
    learner: Learners, rollouts: list[Rollout], tiny_checkpoint: Path
) -> None:
    """With rewards all equal only the KL is left: advantages are minus its sum to come, normalised."""
    trained = learner(algorithm="reinforce_pp", kl_coefficient=0.5, kl_in="reward")
    for _ in range(3):
        update(trained, rollouts)
    level = with_rewards(rollouts, [1.0] * 16)
    batch = trained._learner_connector(episodes=level, rl_module=None, batch={}, shared_data={}, metrics=None)[
        DEFAULT_MODULE_ID
    ]
    kl, mask = batch["penalty_kl"], batch[Columns.LOSS_MASK]
    assert float(kl[mask].mean()) == pytest.approx(kl_by_hand(trained, tiny_checkpoint, rollouts), rel=1e-4)
    to_come = 1.0 - 0.5 * kl.flip(1).cumsum(1).flip(1)
    wanted = (to_come - to_come[mask].mean()) / to_come[mask].std(unbiased=False)
    assert torch.allclose(batch[Columns.ADVANTAGES][mask], wanted[mask], atol=1e-4)
    assert update(trained, level)["kl_to_reference"] == pytest.approx(float(kl[mask].mean()), rel=1e-4)


# -- the critic --------------------------------------------------------------------------------------------------------


def test_the_critic_learns_what_to_expect_and_stays_with_the_learner(
    learner: Learners, rollouts: list[Rollout]
) -> None:
    trained = learner(algorithm="ppo", learning_rate=1e-6, value_learning_rate=3e-3)
    level = with_rewards(rollouts, [2.0] * 16)
    first = update(trained, level)
    assert first["value_loss"] == pytest.approx(2.0) and first["value_mean"] == 0.0
    for _ in range(60):
        last = update(trained, level)
    assert last["value_mean"] == pytest.approx(2.0, abs=0.2) and last["value_loss"] < 0.1
    module = trained.module[DEFAULT_MODULE_ID]
    everything, travelling = module.get_state(), module.get_state(inference_only=True)
    assert travelling.keys() == {name for name in everything if not name.startswith("critic.")} != everything.keys()


def test_the_critic_moves_no_policy_tensor(learner: Learners, rollouts: list[Rollout]) -> None:
    """The policy's gradient is the one of the same advantages without a critic's loss."""
    trained = learner(**FREE, algorithm="ppo")
    found = {name: g for name, g in gradient(trained, rollouts).items() if not name.startswith("critic.")}
    plain = learner(**FREE, algorithm="reinforce_pp")  # with values 0 and lambda 1 both see the same sums
    assert_close(found, gradient(plain, rollouts), 1e-5)


def test_gradient_is_clipped_by_its_global_norm(learner: Learners, rollouts: list[Rollout]) -> None:
    free, clipped = (gradient(learner(gradient_clip=limit), rollouts) for limit in (1e9, 0.01))
    norm = torch.nn.utils.get_total_norm(list(free.values()))
    assert float(norm) > 0.01
    assert_close(clipped, {name: g * 0.01 / norm for name, g in free.items()}, 1e-4)


def test_bf16_autocast_gives_nearly_the_same_gradient(learner: Learners, rollouts: list[Rollout]) -> None:
    exact, rough = (gradient(learner(**FREE, mixed_precision=precision), rollouts) for precision in ("no", "bf16"))
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, rough))
    assert 0.99 < float(torch.nn.functional.cosine_similarity(a, b, dim=0)) < 1.0


# -- failed rollouts ---------------------------------------------------------------------------------------------------


def test_what_a_failed_rollout_holds_does_not_matter(learner: Learners, rollouts: list[Rollout]) -> None:
    failed = {2, 7, 8}
    broken = with_rewards(rollouts, [None if i in failed else r for i, r in enumerate(REWARDS)])
    other = [
        replace(r, actions=(r.actions + 1) % 8, action_logp=r.action_logp - 3) if i in failed else r
        for i, r in enumerate(broken)
    ]
    wanted = gradient(learner(**FREE), broken)
    assert_close(gradient(learner(**FREE), other), wanted, 0.0)
    with pytest.raises(AssertionError):
        assert_close(gradient(learner(**FREE), rollouts), wanted, 1e-3)


def test_a_batch_of_failures_changes_nothing(learner: Learners, rollouts: list[Rollout]) -> None:
    trained = learner()
    before = weights_of(trained)
    metrics = update(trained, with_rewards(rollouts, [None] * 16))
    assert metrics["policy_loss"] == 0.0
    assert all(np.array_equal(before[name], after) for name, after in weights_of(trained).items())


# -- epochs and minibatches --------------------------------------------------------------------------------------------


def test_epochs_and_minibatches_take_every_rollout_once_per_epoch(
    learner: Learners, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, seen = learner(epochs=3, minibatches=2), []
    original = PolicyLearner._update

    def spy(self: PolicyLearner, batch: dict[str, Any], **kwargs: Any) -> Any:
        columns = batch[DEFAULT_MODULE_ID]
        seen.append([bytes(row.numpy().tobytes()) for row in columns[Columns.ACTION_LOGP]])
        return original(self, batch, **kwargs)

    monkeypatch.setattr(PolicyLearner, "_update", spy)
    update(trained, rollouts)
    assert [len(rows) for rows in seen] == [8] * 6
    epochs = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert len(set(epochs[0])) == 16 and set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2], "epochs are shuffled"
    steps = {int(state["step"]) for o in trained._optimizer_parameters for state in o.state_dict()["state"].values()}
    assert steps == {6}


def test_base_features_are_computed_once_per_rollout_not_per_epoch(
    learner: Learners, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    from latent_control.base_lm import BaseLM

    rows = []
    original = BaseLM.features

    def count(self: BaseLM, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(input_ids))
        return original(self, input_ids, *args, **kwargs)

    trained = learner(features="recompute", epochs=3, minibatches=2)
    monkeypatch.setattr(BaseLM, "features", count)
    update(trained, [replace(r, features=None) for r in rollouts])
    assert sum(rows) == 16


def test_a_constant_mean_is_the_token_mean_times_its_share_of_the_longest(
    learner: Learners, rollouts: list[Rollout]
) -> None:
    """16 rollouts of up to 6 tokens: the gradient of the mean over tokens, times the tokens there are by 96."""
    tokens, constant = (gradient(learner(**FREE, loss_mean=mean), rollouts) for mean in ("token", "constant"))
    share = sum(len(r) for r in rollouts) / 96
    assert share < 0.7
    assert_close(constant, {name: share * g for name, g in tokens.items()})


def test_metrics_stay_means_over_tokens_whatever_the_loss_divides_by(
    learner: Learners, rollouts: list[Rollout]
) -> None:
    found = [update(learner(loss_mean=mean), rollouts) for mean in ("token", "constant")]
    assert found[1]["entropy"] == pytest.approx(found[0]["entropy"]) and found[1]["ratio_mean"] == pytest.approx(1.0)


@pytest.mark.parametrize("settings", [{"ratio": "sequence"}, {"surrogate": "cispo"}])
def test_at_the_first_step_every_surrogate_has_the_same_gradient(
    learner: Learners, rollouts: list[Rollout], settings: dict[str, str]
) -> None:
    """All ratios are 1 there: what differs is later steps."""
    plain, other = (gradient(learner(**FREE, loss_mean="sequence", **more), rollouts) for more in ({}, settings))
    assert_close(other, plain, 1e-5)


def test_truncated_rollouts_move_nothing_but_count_in_their_group(learner: Learners, rollouts: list[Rollout]) -> None:
    """Masking the second half of each group leaves the gradient of the others, whose advantages stay."""
    ends = [replace(r, finish_reason="length" if i % 4 > 1 else "stop") for i, r in enumerate(rollouts)]
    masked = gradient(learner(**FREE, mask_truncated=True, loss_mean="constant"), ends)
    others = [replace(r, reward=r.reward if i % 4 < 2 else 9.0) for i, r in enumerate(ends)]
    with pytest.raises(AssertionError):  # their rewards are part of the mean and spread
        assert_close(gradient(learner(**FREE, mask_truncated=True, loss_mean="constant"), others), masked, 0.05)
    longer = [r if i % 4 < 2 else shortened(r, 1) for i, r in enumerate(ends)]
    assert_close(gradient(learner(**FREE, mask_truncated=True, loss_mean="constant"), longer), masked, 1e-5)


def test_more_epochs_than_one_move_the_ratio(learner: Learners, rollouts: list[Rollout]) -> None:
    assert update(learner(epochs=1), rollouts)["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert abs(update(learner(epochs=4), rollouts)["ratio_mean"] - 1.0) > 1e-3


@pytest.mark.parametrize("level", ["latent", "token"])
def test_importance_weights_scale_the_gradient_of_older_rollouts(
    config: Config, tiny_checkpoint: Path, level: str
) -> None:
    """Actions that the behaviour policy found half as likely count twice, or as much as the cap allows."""
    settings = config(improve={"features": "ship"})
    rollouts = with_rewards(sample(make_runner(settings, tiny_checkpoint, level)), REWARDS)

    def weighed(cap: float | None, shift: float = 0.0) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        older = [replace(r, action_logp=r.action_logp - np.float32(shift)) for r in rollouts]
        trained = make_learner(
            config(improve={"features": "ship", "importance_cap": cap, "gradient_clip": 1e9}), tiny_checkpoint, level
        )
        metrics = update(trained, older)
        return {name: p.grad.clone() for name, p in trained.module[DEFAULT_MODULE_ID].trained().items()}, metrics

    plain, metrics = weighed(None)
    assert "importance_mean" not in metrics
    fresh, metrics = weighed(1.5)
    assert_close(fresh, plain, 1e-4)
    assert metrics["importance_mean"] == pytest.approx(1.0, abs=1e-4) and metrics["importance_capped_share"] == 0.0
    for cap, wanted, capped in ((1.5, 1.5, 1.0), (3.0, 2.0, 0.0)):
        found, metrics = weighed(cap, math.log(2.0))
        assert_close(found, {name: wanted * g for name, g in plain.items()}, 1e-4)
        assert metrics["importance_mean"] == pytest.approx(2.0, rel=1e-4) and metrics[
            "importance_capped_share"
        ] == pytest.approx(capped)
        assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-4), (
            "the ratio is to the policy at the start of the update"
        )


def test_a_group_that_meets_a_new_policy_stays_a_group(
    config: Config, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five slots for four groups of four: some rollouts of a group begin after the change, others before."""
    settings = config(rollout={"batch_size": 5})
    trained, runner = make_learner(settings, tiny_checkpoint), make_runner(settings, tiny_checkpoint)
    first = weights_of(trained)
    second = {name: array + 0.01 for name, array in first.items()}
    old, new = (PolicyVersion(version=v, weights_hash=array_hash(w), weights=w) for v, w in ((3, first), (4, second)))

    class Announced:
        """Stands for the policy board: the fourth look finds the new policy."""

        def __init__(self, board: str, version: int, use: Callable[[PolicyVersion], None]) -> None:
            assert (board, version) == ("board", 3)
            self.use, self.looks = use, 0

        def __call__(self) -> int:
            self.looks += 1
            if self.looks == 4:
                self.use(new)
            return 4 if self.looks >= 4 else 3

    monkeypatch.setattr(env_runner, "Follower", Announced)
    asked = {"prompt_indices": (0, 1, 2, 3), "seeds": (3,) * 4, "group_size": 4, "policy": old, "board": "board"}
    request = RolloutRequest(request_id=0, split="train", **asked)
    rollouts, (summary, _) = runner.sample_request(request)
    versions = [r.policy_version for r in rollouts]
    assert {3, 4} == set(versions) and any(len(set(versions[i : i + 4])) == 2 for i in range(0, 16, 4)), (
        "a group began under both"
    )
    mixed = [r for r in rollouts if len(r.action_versions)]
    assert mixed and all(r.policy_version == 3 and set(r.action_versions.tolist()) == {3, 4} for r in mixed)
    assert all(r.policy_hash == (old if r.policy_version == 3 else new).weights_hash for r in rollouts)
    counts = Counter(v for r in rollouts for v in (r.action_versions.tolist() or [r.policy_version] * len(r)))
    assert summary.policies == ((3, old.weights_hash, counts[3]), (4, new.weights_hash, counts[4]))
    assert len({r.group_id for r in rollouts}) == 4 and len({r.rollout_id for r in rollouts}) == 16
    assert group_size(rollouts) == 4


def test_learning_rate_follows_the_number_of_updates(
    learner: Learners, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, rates = (
        learner(max_logp_mismatch=100.0, updates=8, warmup_updates=4, learning_rate=0.08, min_learning_rate_share=0.5),
        [],
    )
    original = PolicyLearner.apply_gradients

    def spy(self: PolicyLearner, gradients: Any) -> None:
        rates.extend(group["lr"] for o in self._optimizer_parameters for group in o.param_groups)
        original(self, gradients)

    monkeypatch.setattr(PolicyLearner, "apply_gradients", spy)
    for _ in range(6):
        update(trained, rollouts)
    quarter = 0.04 + 0.04 * 0.8535533905932737  # a quarter of the way down, cos(pi / 4)
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.08, quarter])


# -- invariant 6: what changes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["latent", "token"])
@pytest.mark.parametrize("features", ["ship", "recompute"])
def test_only_trained_tensors_change(config: Config, tiny_checkpoint: Path, level: str, features: str) -> None:
    settings = config(improve={"features": features, "kl_coefficient": 0.1})
    trained = make_learner(settings, tiny_checkpoint, level)
    module = trained.module[DEFAULT_MODULE_ID]
    rollouts = with_rewards(
        sample(make_runner(settings, tiny_checkpoint, level), ship_features=features == "ship"), REWARDS
    )
    connector = next(c for c in trained._learner_connector.connectors if hasattr(c, "base"))
    watched = {"policy": module.policy, "reference": trained.reference} | (
        {"base": connector.base} if connector.base else {}
    )
    before = {part: {n: t.clone() for n, t in model.state_dict().items()} for part, model in watched.items()}
    update(trained, rollouts)
    changed = {
        p: {n for n, t in m.state_dict().items() if not torch.equal(t, before[p][n])} for p, m in watched.items()
    }
    assert changed["policy"] == module.trained().keys() == weights_of(trained).keys()
    assert not changed["reference"] and not changed.get("base")
    frozen = before["policy"].keys() - module.trained().keys()
    assert frozen == ({"head.weight"} if level == "token" else set())


def test_optimiser_holds_the_trained_tensors_only(learner: Learners) -> None:
    trained = learner(level="token")
    held = [p for o in trained._optimizer_parameters for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trained.module[DEFAULT_MODULE_ID].trained().values()}


def test_foreign_weights_are_refused(learner: Learners) -> None:
    module = learner().module[DEFAULT_MODULE_ID]
    weights = module.get_state()
    with pytest.raises(ValueError, match=r"do not fit.*head\.weight"):
        module.set_state({name: w for name, w in weights.items() if name != "head.weight"})
    with pytest.raises(ValueError, match=r"do not fit.*extra"):
        module.set_state(weights | {"extra": np.zeros(1)})


# -- invariant 4: worker and learner agree -----------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["latent", "token"])
@pytest.mark.parametrize("features", ["ship", "recompute"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_k": 3}, {"temperature": 1.5, "top_k": 2}])
def test_worker_and_learner_agree_on_log_probabilities(
    config: Config, tiny_checkpoint: Path, level: str, features: str, sampling: dict[str, Any]
) -> None:
    """With weights that are no longer those of the checkpoint, prompts of several lengths, and decoding from a
    cache."""
    settings = config(
        improve={"features": features, "kl_coefficient": 0.1, "entropy_coefficient": 0.01}, rollout=sampling
    )
    trained, runner = make_learner(settings, tiny_checkpoint, level), make_runner(settings, tiny_checkpoint, level)
    first = sample(runner, trained, ship_features=features == "ship", **sampling)
    update(trained, with_rewards(first, REWARDS))
    second = sample(runner, trained, ship_features=features == "ship", **sampling)
    assert {len(r.prompt_tokens) for r in second} == {5, 6, 7}
    assert any(not np.array_equal(a.actions, b.actions) for a, b in zip(first, second, strict=True))
    metrics = update(trained, with_rewards(second, REWARDS))
    assert metrics["logp_gap"] < 2e-6
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5) and metrics["clip_share"] == 0.0


def test_stale_weights_show_in_the_gap(config: Config, tiny_checkpoint: Path) -> None:
    """The measure of agreement can fail."""
    trained, runner = make_learner(config(), tiny_checkpoint), make_runner(config(), tiny_checkpoint)
    rollouts = with_rewards(sample(runner, trained), REWARDS)
    update(trained, rollouts)
    assert update(trained, rollouts)["logp_gap"] > 1e-3


def test_shipped_and_recomputed_features_give_the_same_gradient(learner: Learners, rollouts: list[Rollout]) -> None:
    shipped = gradient(learner(**FREE), rollouts)
    bare = [replace(r, features=None) for r in rollouts]
    assert_close(gradient(learner(**FREE, features="recompute"), bare), shipped, 1e-5)


def test_greedy_baselines_are_the_rewards_of_greedy_rollouts(config: Config, tiny_checkpoint: Path) -> None:
    runner, prompts = make_runner(config(), tiny_checkpoint), {"prompt_indices": tuple(range(24)), "seeds": (3,) * 24}
    found, plain = sample(runner, **prompts, greedy_baseline=True), sample(runner, **prompts)
    greedy = [r.reward for r in sample(runner, **prompts, temperature=0.0, group_size=1)]
    assert len(set(greedy)) > 1
    assert [r.baseline for r in found] == [reward for reward in greedy for _ in range(4)]
    assert [r.text for r in found] == [r.text for r in plain] and all(r.baseline is None for r in plain)


@pytest.mark.parametrize("trains", ["lora", "steering", "added_blocks", "mlp", "all"])
def test_worker_and_learner_agree_at_token_level_whatever_is_trained(
    config: Config, tiny_checkpoint: Path, trains: str
) -> None:
    settings = config(improve={"level": "token", "token_trains": trains, "kl_coefficient": 0.1, "learning_rate": 1e-3})
    trained, runner = make_learner(settings, tiny_checkpoint, "token"), make_runner(settings, tiny_checkpoint, "token")
    ships = trains != "all"
    for _ in range(3):  # added blocks open in the first update only
        rollouts = with_rewards(sample(runner, trained, ship_features=ships), REWARDS)
        metrics = update(trained, rollouts)
        assert metrics["logp_gap"] < 2e-6 and metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["kl_to_reference"] > 1e-6
    names = set(weights_of(trained))
    everywhere = {"all": "base.lm.model.embed_tokens.weight", "mlp": "shift.head.weight"}
    assert everywhere[trains] in names if trains in everywhere else all("layers." in name for name in names)


def test_adapters_merge_into_what_peft_computes(config: Config, tiny_checkpoint: Path) -> None:
    """The blocks with PEFT's own adapters in place, and those that hold the merged weights."""
    trained = make_learner(
        config(improve={"level": "token", "token_trains": "lora", "token_rank": 2}), tiny_checkpoint, "token"
    )
    module = trained.module[DEFAULT_MODULE_ID]
    with torch.no_grad():
        for number, parameter in enumerate(module.trained().values()):
            parameter.copy_(torch.linspace(-0.3, 0.2 + 0.1 * number, parameter.numel()).view(parameter.shape))
    assert all(".lora_" in name and 2 in p.shape for name, p in module.trained().items())
    arguments = {name: value for name, value in module.model_config.items() if name not in ("critic", "adapter_rank")}
    plain, untouched, states = build_policy(**arguments), build_policy(**arguments), torch.randn(2, 5, 32)
    weights = {name: torch.from_numpy(array) for name, array in module.get_state(inference_only=True).items()}
    assert weights.keys() == {name for name, p in plain.named_parameters() if p.requires_grad}
    plain.load_state_dict(weights, strict=False)
    with torch.no_grad():
        assert torch.allclose(plain(states), module.policy(states), atol=1e-5)
        assert not torch.allclose(plain(states), untouched(states), atol=1e-2)


def test_worker_and_learner_agree_on_codes_that_last(config: Config, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Log-probabilities are compared, and actions trained, only where a span begins."""
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    model.config = replace(model.config, span=2)
    checkpoint = model.save_pretrained(tmp_path / "spans")
    settings = config(improve={"algorithm": "ppo"})
    host = replace(host_of(tiny_checkpoint), checkpoint=str(checkpoint))
    runner = EvenRunner(config=rllib_config(settings, host), worker_index=0)
    rllib = rllib_config(settings, host)
    rllib.learner_config_dict[KEY] = replace(rllib.learner_config_dict[KEY], span=2)
    trained = rllib.build_learner(spaces={DEFAULT_MODULE_ID: (rllib.observation_space, rllib.action_space)})
    for _ in range(2):
        rollouts = with_rewards(sample(runner, trained), REWARDS)
        metrics = update(trained, rollouts)
        assert metrics["logp_gap"] < 2e-6 and metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    for r in rollouts:
        places = np.arange(len(r)) // 2 * 2
        assert (
            np.array_equal(r.actions, r.actions[places]) and not r.action_logp[1::2].any() and r.action_logp[::2].all()
        )


# -- the reference policy ----------------------------------------------------------------------------------------------


def kl_by_hand(trained: PolicyLearner, checkpoint: Path, rollouts: Sequence[Rollout]) -> float:
    """Mean over tokens of KL(current policy || policy of the checkpoint)."""
    reference = latent_policy(checkpoint)
    current = trained.module[DEFAULT_MODULE_ID].policy
    terms = []
    for r in rollouts:
        states = torch.from_numpy(r.features.copy())[None]
        with torch.no_grad():
            p, q = (action_log_probs(policy(states)[0, len(r.prompt_tokens) - 1 :]) for policy in (current, reference))
        terms.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(terms).mean())


def test_kl_is_to_the_checkpoints_policy_before_and_after_a_restore(
    learner: Learners, rollouts: list[Rollout], tiny_checkpoint: Path
) -> None:
    trained = learner(kl_coefficient=0.05)
    assert update(trained, rollouts)["kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    update(trained, rollouts)
    wanted = kl_by_hand(trained, tiny_checkpoint, rollouts)
    assert wanted > 1e-3
    restored = learner(kl_coefficient=0.05)
    restored.set_state(trained.get_state())
    for one in (trained, restored):
        assert update(one, rollouts)["kl_to_reference"] == pytest.approx(wanted, rel=1e-4)


def test_kl_holds_the_policy_back(learner: Learners, rollouts: list[Rollout], tiny_checkpoint: Path) -> None:
    distances = []
    for coefficient in (0.0, 5.0):
        trained = learner(kl_coefficient=coefficient, epochs=8)
        update(trained, rollouts)
        distances.append(kl_by_hand(trained, tiny_checkpoint, rollouts))
    assert distances[1] < 0.7 * distances[0]


# -- broken numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_followed(
    learner: Learners, rollouts: list[Rollout], reward: float
) -> None:
    trained = learner()
    update(trained, rollouts)
    before, moments = weights_of(trained), [o.state_dict()["state"] for o in trained._optimizer_parameters]
    moments = [{i: {k: v.clone() for k, v in s.items()} for i, s in m.items()} for m in moments]
    metrics = update(trained, with_rewards(rollouts, [reward, *REWARDS[1:]]))
    assert metrics["update_broken"] == 1 and metrics["steps_taken"] == 0
    assert all(np.array_equal(before[name], after) for name, after in weights_of(trained).items())
    for optimizer, old in zip(trained._optimizer_parameters, moments, strict=True):
        assert all(torch.equal(v, old[i][k]) for i, s in optimizer.state_dict()["state"].items() for k, v in s.items())


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "algorithm"), [("latent", "grpo"), ("token", "grpo"), ("latent", "ppo"), ("token", "ppo")]
)
def test_state_survives_the_disk_and_the_next_update_is_the_same(
    config: Config, tiny_checkpoint: Path, tmp_path: Path, level: str, algorithm: str
) -> None:
    settings = config(improve={"algorithm": algorithm, "warmup_updates": 10, "epochs": 2, "minibatches": 2})
    rollouts = with_rewards(sample(make_runner(settings, tiny_checkpoint, level)), REWARDS)
    straight = make_learner(settings, tiny_checkpoint, level)
    for _ in range(3):
        update(straight, rollouts)
    state = straight.get_state(components=[COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER])
    checkpoints.save_tree(
        tmp_path, "learner", {name: state[name] for name in (COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER)}
    )
    restored = make_learner(settings, tiny_checkpoint, level)
    restored.set_state({**checkpoints.load_tree(tmp_path, "learner"), "weights_seq_no": 3})
    update(straight, rollouts)
    update(restored, rollouts)
    continued, again = weights_of(straight), weights_of(restored)
    assert all(np.array_equal(continued[name], again[name]) for name in continued)
    assert not list(tmp_path.glob("*.pkl"))


def test_an_older_state_is_taken_by_a_learner_that_has_gone_on(learner: Learners, rollouts: list[Rollout]) -> None:
    """RLlib ignores weights with a smaller number of updates than its own."""
    trained = learner(warmup_updates=4)
    start = copy.deepcopy(trained.get_state())
    update(trained, rollouts)
    state = copy.deepcopy(trained.get_state())
    update(trained, rollouts)
    wanted = weights_of(trained)
    update(trained, rollouts)
    trained.set_state(state)
    update(trained, rollouts)
    assert all(np.array_equal(wanted[name], w) for name, w in weights_of(trained).items())
    trained.set_state(start)
    assert trained._weights_seq_no == 0 and not any(o.state_dict()["state"] for o in trained._optimizer_parameters)
