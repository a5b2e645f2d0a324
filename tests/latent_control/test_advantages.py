"""The algorithms' advantages: numbers by hand, failed rollouts, and what must not change them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_control.algorithms import ALGORITHMS, AdvantageEstimate, Outcomes

GROUPED = ("dr_grpo", "grpo", "rloo")


def outcomes(
    rewards: list[list[float]], valid: list[list[bool]] | None = None, lengths: list[int] | None = None, **more: Any
) -> Outcomes:
    """Groups of rollouts; each takes ``lengths`` actions (default 1) after a prompt of one token."""
    flat = torch.tensor(rewards).flatten()
    mask = torch.ones(len(flat), dtype=torch.bool) if valid is None else torch.tensor(valid).flatten()
    counts = torch.tensor(lengths or [1] * len(flat))
    taken = (torch.arange(int(counts.max()) + 1)[None] >= 1) & (
        torch.arange(int(counts.max()) + 1)[None] <= counts[:, None]
    )
    return Outcomes(rewards=flat, valid=mask, group_size=len(rewards[0]), taken=taken & mask[:, None], **more)


def estimate(algorithm: str, *arguments: Any, **more: Any) -> AdvantageEstimate:
    return ALGORITHMS[algorithm].estimate(outcomes(*arguments, **more))


def of(algorithm: str, rewards: list[float], valid: list[bool] | None = None, **more: Any) -> list[float]:
    """Advantages of one group whose rollouts take one action each."""
    return estimate(algorithm, [rewards], None if valid is None else [valid], **more).advantages[:, 1].tolist()


# -- within the group --------------------------------------------------------------------------------------------------


def test_rloo_is_the_reward_minus_the_mean_of_the_others() -> None:
    assert of("rloo", [1.0, 0.0, 0.0, 3.0]) == pytest.approx([0.0, -4 / 3, -4 / 3, 8 / 3])
    assert of("rloo", [1.0, 0.0]) == [1.0, -1.0]


def test_rloo_leaves_failed_rollouts_out() -> None:
    # The valid ones are 1 and 3: 1 - 3 and 3 - 1.
    assert of("rloo", [1.0, 9.0, 3.0], [True, False, True]) == [-2.0, 0.0, 2.0]


def test_rloo_of_a_lone_valid_rollout_is_zero() -> None:
    assert of("rloo", [1.0, 0.0, 0.0], [True, False, False]) == [0.0, 0.0, 0.0]


def test_grpo_is_the_standard_score() -> None:
    # Mean 1, population standard deviation 1.
    assert of("grpo", [0.0, 2.0]) == pytest.approx([-1.0, 1.0], abs=2e-4)
    # Mean 2, population standard deviation 2.
    assert of("grpo", [0.0, 4.0, 0.0, 4.0]) == pytest.approx([-1.0, 1.0, -1.0, 1.0], abs=2e-4)


def test_grpo_leaves_failed_rollouts_out_of_mean_and_deviation() -> None:
    assert of("grpo", [0.0, 2.0, 100.0], [True, True, False]) == pytest.approx([-1.0, 1.0, 0.0], abs=2e-4)


def test_dr_grpo_is_the_reward_minus_the_mean() -> None:
    assert of("dr_grpo", [0.0, 4.0, 0.0, 4.0]) == [-2.0, 2.0, -2.0, 2.0]
    assert of("dr_grpo", [1.0, 9.0, 3.0], [True, False, True]) == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("algorithm", GROUPED)
def test_every_action_of_a_rollout_shares_its_advantage(algorithm: str) -> None:
    found = estimate(algorithm, [[0.0, 1.0]], lengths=[1, 3]).advantages
    single = of(algorithm, [0.0, 1.0])
    assert found.tolist() == [[0.0, single[0], 0.0, 0.0], [0.0, single[1], single[1], single[1]]]


@pytest.mark.parametrize("algorithm", GROUPED)
@pytest.mark.parametrize("reward", [0.0, 1.0, -2.5])
def test_equal_rewards_teach_nothing(algorithm: str, reward: float) -> None:
    assert of(algorithm, [reward] * 4) == [0.0] * 4


@pytest.mark.parametrize("algorithm", GROUPED)
def test_groups_do_not_mix(algorithm: str) -> None:
    rewards = [[0.0, 1.0, 1.0], [5.0, 5.0, 8.0]]
    together = estimate(algorithm, rewards).advantages
    alone = [estimate(algorithm, [group]).advantages for group in rewards]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("algorithm", GROUPED)
def test_penalties_come_off_the_reward(algorithm: str) -> None:
    """Two actions of -0.25 and -0.5 cost the second rollout 0.75; what stands at other positions is no action's."""
    penalties = torch.tensor([[-9.0, 0.0, -9.0], [-9.0, -0.25, -0.5]])
    found = estimate(algorithm, [[0.0, 2.0]], lengths=[1, 2], penalties=penalties).advantages
    assert torch.allclose(found, estimate(algorithm, [[0.0, 1.25]], lengths=[1, 2]).advantages)


GROUPS = st.integers(2, 6).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(-8, 8).map(float), min_size=size, max_size=size),
        st.lists(st.booleans(), min_size=size, max_size=size),
    )
)


@pytest.mark.parametrize("algorithm", GROUPED)
@settings(max_examples=60, deadline=None)
@given(group=GROUPS, shift=st.integers(-4, 4), order=st.randoms(use_true_random=False))
def test_properties(algorithm: str, group: tuple[list[float], list[bool]], shift: int, order: object) -> None:
    rewards, valid = group
    found = of(algorithm, rewards, valid)
    assert sum(found) == pytest.approx(0.0, abs=1e-3)
    assert all(a == 0.0 for a, v in zip(found, valid, strict=True) if not v)
    # A baseline takes a constant off; it changes no advantage.
    assert of(algorithm, [r + shift for r in rewards], valid) == pytest.approx(found, abs=1e-3)
    # What a failed rollout's reward field holds does not matter.
    assert of(algorithm, [r if v else 99.0 for r, v in zip(rewards, valid, strict=True)], valid) == pytest.approx(
        found, abs=1e-6
    )
    # Better rewards never have smaller advantages.
    pairs = [(r, a) for r, a, v in zip(rewards, found, valid, strict=True) if v]
    assert all(a >= b - 1e-6 for r, a in pairs for s, b in pairs if r > s)
    places = list(range(len(rewards)))
    order.shuffle(places)  # type: ignore[attr-defined]
    assert of(algorithm, [rewards[i] for i in places], [valid[i] for i in places]) == pytest.approx(
        [found[i] for i in places], abs=1e-5
    )


def test_scale_changes_rloo_and_dr_grpo_in_proportion_and_grpo_hardly() -> None:
    rewards, tenfold = [0.0, 1.0, 3.0], [0.0, 10.0, 30.0]
    for algorithm in ("rloo", "dr_grpo"):
        assert of(algorithm, tenfold) == pytest.approx([10 * a for a in of(algorithm, rewards)])
    assert of("grpo", tenfold) == pytest.approx(of("grpo", rewards), abs=1e-3)


# -- the greedy rollout as baseline ------------------------------------------------------------------------------------


def test_remax_is_the_reward_minus_the_greedy_rollouts() -> None:
    assert of("remax", [1.0, 0.0], baselines=torch.tensor([0.25, 0.25])) == [0.75, -0.25]


def test_remax_leaves_out_what_could_not_be_judged() -> None:
    baselines = torch.tensor([0.0, 0.0, math.nan, math.nan])
    found = estimate("remax", [[1.0, 1.0], [1.0, 1.0]], [[True, False], [True, True]], baselines=baselines).advantages
    assert found[:, 1].tolist() == [1.0, 0.0, 0.0, 0.0]


# -- over the batch ----------------------------------------------------------------------------------------------------


def test_reinforce_pp_normalises_over_all_actions_of_the_batch() -> None:
    # Four actions: 3, -1, -1, -1: mean 0, variance 3.
    found = estimate("reinforce_pp", [[3.0], [-1.0]], lengths=[1, 3]).advantages
    low = -1 / math.sqrt(3)
    assert torch.allclose(found, torch.tensor([[0.0, math.sqrt(3), 0.0, 0.0], [0.0, low, low, low]]), atol=1e-6)


def test_reinforce_pp_discounts_what_comes_later() -> None:
    # Sums to come: 0.25, 0.5, 1 for the first rollout; 0 for the second.
    found = estimate("reinforce_pp", [[1.0], [0.0]], lengths=[3, 1], discount=0.5).advantages
    sums = torch.tensor([0.25, 0.5, 1.0, 0.0])
    wanted = (sums - sums.mean()) / sums.std(unbiased=False)
    assert torch.allclose(torch.cat([found[0, 1:], found[1, 1:2]]), wanted, atol=1e-6)


def test_reinforce_pp_counts_penalties_from_where_they_fall() -> None:
    penalties = torch.tensor([[0.0, -1.0, -2.0]])
    found = estimate("reinforce_pp", [[5.0]], lengths=[2], penalties=penalties).advantages  # to come: 2 and 3
    assert torch.allclose(found, torch.tensor([[0.0, -1.0, 1.0]]), atol=1e-6)


def test_normalisation_asks_the_other_learners() -> None:
    """Two learners with one action each, rewards 0 and 2: each alone would see no spread."""
    # Per mean that is asked for, what the other learner adds: its reward, its squared difference from 1, its square.
    others = iter([torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([4.0, 1.0])])

    def average(moments: torch.Tensor) -> torch.Tensor:
        return (moments + next(others)) / 2

    assert of("reinforce_pp", [0.0], average=average) == pytest.approx([-1.0])
    assert next(others, None) is None


def test_ppo_by_hand() -> None:
    # delta = 0 + 0.5 * 0.4 - 0.2 = 0 and 1 - 0.4 = 0.6; A = 0 + 0.5 * 0.5 * 0.6 = 0.15 and 0.6.
    values = torch.tensor([[7.0, 0.2, 0.4]])
    found = estimate("ppo", [[1.0]], lengths=[2], values=values, discount=0.5, gae_lambda=0.5)
    assert found.returns is not None
    assert found.returns[0, 1:3].tolist() == pytest.approx([0.35, 1.0])
    assert found.advantages[0, 1:3].tolist() == pytest.approx([-1.0, 1.0])


def test_ppo_without_discount_waits_for_the_reward_itself() -> None:
    values = torch.tensor([[0.0, 0.3, 0.9], [0.0, 0.3, 0.1]])
    found = estimate("ppo", [[1.0], [0.0]], lengths=[2, 2], values=values)
    assert found.returns is not None
    assert torch.allclose(found.returns[:, 1:], torch.tensor([[1.0, 1.0], [0.0, 0.0]]), atol=1e-6)
    raw = torch.tensor([0.7, 0.1, -0.3, -0.1])
    assert torch.allclose(found.advantages[:, 1:].flatten(), (raw - raw.mean()) / raw.std(unbiased=False), atol=1e-6)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_all_failed_teaches_nothing(algorithm: str) -> None:
    more = {"baselines": torch.zeros(3), "values": torch.ones(3, 2)}
    assert of(algorithm, [0.0, 0.0, 0.0], [False] * 3, **more) == [0.0] * 3


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_failed_rollout_changes_nothing_for_the_others(algorithm: str) -> None:
    more: dict[str, Any] = {
        "baselines": torch.full((3,), 0.5),
        "values": torch.tensor([[0.0, 0.1], [0.0, 8.0], [0.0, 0.3]]),
    }
    valid = [[True, False, True]]
    ones = estimate(algorithm, [[1.0, 0.0, 0.0]], valid, **more).advantages
    others = estimate(algorithm, [[1.0, 50.0, 0.0]], valid, **more).advantages
    assert torch.equal(ones, others) and ones[1].tolist() == [0.0, 0.0]
    assert ones[0, 1] > ones[2, 1]
