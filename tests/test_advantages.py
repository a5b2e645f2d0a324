"""Group advantages: numbers by hand, failed rollouts, and what must not change them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_control.advantages import ADVANTAGES, grpo, rloo

ALGORITHMS = sorted(ADVANTAGES)


def of(algorithm: str, rewards: list[float], valid: list[bool] | None = None) -> list[float]:
    mask = torch.ones(1, len(rewards), dtype=torch.bool) if valid is None else torch.tensor([valid])
    return ADVANTAGES[algorithm](torch.tensor([rewards]), mask)[0].tolist()


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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("reward", [0.0, 1.0, -2.5])
def test_equal_rewards_teach_nothing(algorithm: str, reward: float) -> None:
    assert of(algorithm, [reward] * 4) == [0.0] * 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_failed_teaches_nothing(algorithm: str) -> None:
    assert of(algorithm, [0.0, 0.0, 0.0], [False] * 3) == [0.0] * 3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_groups_do_not_mix(algorithm: str) -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0], [5.0, 5.0, 8.0]])
    valid = torch.ones(2, 3, dtype=torch.bool)
    together = ADVANTAGES[algorithm](rewards, valid)
    for row in range(2):
        assert torch.equal(together[row : row + 1], ADVANTAGES[algorithm](rewards[row : row + 1], valid[row : row + 1]))


GROUPS = st.integers(2, 6).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(-8, 8).map(float), min_size=size, max_size=size), st.lists(st.booleans(), min_size=size, max_size=size)
    )
)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
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
    assert of(algorithm, [r if v else 99.0 for r, v in zip(rewards, valid, strict=True)], valid) == pytest.approx(found, abs=1e-6)
    # Better rewards never have smaller advantages.
    pairs = [(r, a) for r, a, v in zip(rewards, found, valid, strict=True) if v]
    assert all(a >= b - 1e-6 for r, a in pairs for s, b in pairs if r > s)
    places = list(range(len(rewards)))
    order.shuffle(places)  # type: ignore[attr-defined]
    assert of(algorithm, [rewards[i] for i in places], [valid[i] for i in places]) == pytest.approx([found[i] for i in places], abs=1e-5)


def test_scale_changes_rloo_in_proportion_and_grpo_hardly() -> None:
    rewards, valid = torch.tensor([[0.0, 1.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert torch.allclose(rloo(10 * rewards, valid), 10 * rloo(rewards, valid))
    assert torch.allclose(grpo(10 * rewards, valid), grpo(rewards, valid), atol=1e-3)
