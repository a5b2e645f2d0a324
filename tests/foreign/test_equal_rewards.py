"""Rewards without a spread teach nothing, whatever their value, count, groups and learners: advantages are exactly 0.
Where there is a spread, advantages are those of exact arithmetic."""

from __future__ import annotations

import threading
from fractions import Fraction
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_control.algorithms import ALGORITHMS, Outcomes
from pipeline.evaluation.statistics import centred
from pipeline.pages.explorer.gain import leave_one_out

VALUES = st.one_of(
    st.sampled_from([0.1, 0.3, 0.7, 7.3, 100.3, 1e-7, 1e9 + 0.1, -0.1, 1 / 3]),
    st.floats(-1e12, 1e12, allow_subnormal=False),
)


def outcomes(rewards: np.ndarray, size: int, lengths: np.ndarray, **more: object) -> Outcomes:
    taken = torch.arange(int(lengths.max()))[None] < torch.from_numpy(lengths)[:, None]
    valid = torch.ones(len(rewards), dtype=torch.bool)
    more = {"baselines": torch.from_numpy(rewards), "values": torch.zeros(taken.shape)} | more
    return Outcomes(rewards=torch.from_numpy(rewards), valid=valid, group_size=size, taken=taken, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
@settings(max_examples=120, deadline=None)
@given(value=VALUES, size=st.integers(1, 9), groups=st.integers(1, 40), seed=st.integers(0, 999))
def test_equal_rewards_give_exactly_zero(algorithm: str, value: float, size: int, groups: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 9, size * groups)
    found = ALGORITHMS[algorithm].estimate(outcomes(np.full(size * groups, value), size, lengths)).advantages
    assert not found.any()


@pytest.mark.parametrize("learners", [2, 3, 5])
@pytest.mark.parametrize("algorithm", ["reinforce_pp", "ppo"])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 7.3, 100.3, 1e9 + 0.1])
def test_equal_rewards_of_several_learners_give_exactly_zero(algorithm: str, learners: int, value: float) -> None:
    rng = np.random.default_rng(learners)
    shares = [outcomes(np.full(n, value), 1, rng.integers(1, 9, n)) for n in rng.integers(1, 40, learners)]
    assert not torch.cat([found.flatten() for found in over_learners(algorithm, shares)]).any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), centre=st.sampled_from([0.0, 1.0, 1000.0, 1e6, -3e4]), learners=st.integers(1, 4))
def test_normalised_advantages_are_those_of_exact_arithmetic(seed: int, centre: float, learners: int) -> None:
    rng = np.random.default_rng(seed)
    shares = [
        outcomes(centre + 0.1 * rng.standard_normal(n), 1, rng.integers(1, 5, n)) for n in rng.integers(2, 9, learners)
    ]
    exact = [
        Fraction(r)
        for o in shares
        for r, n in zip(o.rewards.tolist(), o.taken.sum(1).tolist(), strict=True)
        for _ in range(n)
    ]
    mean = sum(exact) / len(exact)
    std = sqrt(float(sum((x - mean) ** 2 for x in exact) / len(exact)))
    wanted = [float(x - mean) / (std + 1e-8) for x in exact]
    found = [
        a for o, rows in zip(shares, over_learners("reinforce_pp", shares), strict=True) for a in rows[o.taken].tolist()
    ]
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def over_learners(algorithm: str, shares: list[Outcomes]) -> list[torch.Tensor]:
    """Advantages of each learner's share; their means are taken together, as an all-reduce does."""
    barrier, boxes = threading.Barrier(len(shares)), [torch.zeros(0)] * len(shares)
    found: list[torch.Tensor] = [torch.zeros(0)] * len(shares)

    def learner(rank: int) -> None:
        def average(moments: torch.Tensor) -> torch.Tensor:
            boxes[rank] = moments
            barrier.wait()
            mean = torch.stack(boxes).sum(0) / len(shares)
            barrier.wait()
            return mean

        own = {name: getattr(shares[rank], name) for name in Outcomes.__dataclass_fields__}
        found[rank] = ALGORITHMS[algorithm].estimate(Outcomes(**own | {"average": average})).advantages

    threads = [threading.Thread(target=learner, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("centre", [0.0, 1000.0, 1e6])
def test_advantages_of_groups_do_not_depend_on_a_constant(algorithm: str, centre: float) -> None:
    steps = np.array([0.0, 0.125, 0.125, 0.5])  # exact beside any centre here
    ones = np.ones(4, int)
    there, here = (ALGORITHMS[algorithm].estimate(outcomes(steps + c, 4, ones)).advantages for c in (centre, 0.0))
    assert torch.equal(there, here) and here.any()


@settings(max_examples=80, deadline=None)
@given(value=VALUES, sizes=st.lists(st.integers(1, 7), min_size=1, max_size=9))
def test_equal_rewards_of_stored_rollouts_give_exactly_zero(value: float, sizes: list[int]) -> None:
    """Method ``filtered`` of offline improvement keeps whatever is above 0; the explorer credits codes by it."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    rewards = np.full(len(groups), value)
    assert not centred(rewards, groups).any() and not leave_one_out(rewards, groups).any()
    assert leave_one_out(np.array([1.0, 0.0, 0.0, 5.0]), np.array([0, 0, 0, 1])).tolist() == [1.0, -0.5, -0.5, 0.0]
