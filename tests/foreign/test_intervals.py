"""Intervals cover as often as they say where little is known: few prompts, few that differ, none that do."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from scipy.stats import beta, binom, binomtest

from pipeline.evaluation import statistics as st
from pipeline.experiments.codebook_score import CodesTrial
from pipeline.experiments.tune_codes import equals, recommended, reward_intervals, verdict

NOMINAL = 0.93


@pytest.mark.parametrize("prompts", [5, 8, 20, 100, 512])
@pytest.mark.parametrize("discordant", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("better", [0.5, 0.8, 1.0])
def test_paired_differences_cover(prompts: int, discordant: float, better: float) -> None:
    """Exactly: over all counts of better and worse prompts that are likely at all."""
    if prompts * discordant > 12:
        pytest.skip("many discordant prompts: a bootstrap")
    truth, covered = discordant * (2 * better - 1), 0.0
    for moved in range(int(binom.isf(1e-6, prompts, discordant)) + 1):
        for ups in range(moved + 1):
            chance = binom.pmf(moved, prompts, discordant) * binom.pmf(ups, moved, better)
            if chance < 1e-7:
                continue
            found = st.paired_difference(pairs(ups, moved - ups, prompts), np.zeros(prompts), seed=0)
            assert found["low"] < found["high"]
            covered += chance * (found["low"] <= truth <= found["high"])
    assert covered >= NOMINAL


def pairs(ups: int, downs: int, prompts: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [ups, downs, prompts - ups - downs])


@pytest.mark.parametrize("ups", range(13))
def test_zero_is_excluded_where_the_sign_test_rejects(ups: int) -> None:
    for downs in range(13 - ups):
        found = st.paired_difference(pairs(ups, downs, 600), np.zeros(600), seed=0)
        rejected = ups + downs > 0 and binomtest(ups, ups + downs).pvalue < 0.05
        assert (found["low"] > 0 or found["high"] < 0) == rejected
        if ups != downs:
            tail = sum(comb(ups + downs, i) for i in range(min(ups, downs) + 1)) / 2 ** (ups + downs)
            assert rejected == (2 * tail < 0.05)


@pytest.mark.parametrize("scale", [0.5, 20.0, 1000.0])
def test_differences_of_rewards_of_any_size_cover(scale: float) -> None:
    """Rewards are no shares: nothing bounds their interval at 1."""
    rng, covered = np.random.default_rng(3), 0
    for _ in range(400):
        difference = scale * rng.normal(0.3, 1.0, 20)
        found = st.paired_difference(difference, np.zeros(20), seed=0)
        covered += found["low"] <= 0.3 * scale <= found["high"]
    assert covered / 400 >= NOMINAL


@pytest.mark.parametrize("prompts", [5, 10, 20, 60, 512])
@pytest.mark.parametrize("rate", [0.005, 0.02, 0.1, 0.5, 0.9, 0.98, 0.995])
def test_success_rates_cover(prompts: int, rate: float) -> None:
    counts = np.arange(prompts + 1)
    bounds = np.array([st.success_interval(int(count), prompts) for count in counts])
    assert (bounds[:, 0] < bounds[:, 1]).all()
    assert binom.pmf(counts, prompts, rate)[(bounds[:, 0] <= rate) & (rate <= bounds[:, 1])].sum() >= NOMINAL


def test_the_exact_interval_is_clopper_and_pearsons() -> None:
    assert st.exact_interval(3, 10) == pytest.approx([beta.ppf(0.025, 3, 8), beta.ppf(0.975, 4, 7)])
    assert st.exact_interval(0, 12) == pytest.approx([0.0, 1 - 0.025 ** (1 / 12)])  # (1 - p)^12 = 0.025
    assert st.exact_interval(12, 12) == pytest.approx([0.025 ** (1 / 12), 1.0])
    assert st.exact_interval(0, 0) == [0.0, 1.0]


@pytest.mark.parametrize("samples", [4, 8])
@pytest.mark.parametrize("prompts", [5, 20, 200])
@pytest.mark.parametrize("rate", [0.02, 0.3, 0.97])
def test_means_over_several_samples_cover(samples: int, prompts: int, rate: float) -> None:
    """Prompts differ: their rates are drawn from a beta distribution with mean ``rate``."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        own = rng.beta(2 * rate, 2 * (1 - rate), prompts)
        low, high = st.rate_interval(rng.binomial(samples, own) / samples, seed=0)
        assert low < high
        covered += low <= rate <= high
    assert covered / 200 >= NOMINAL - 0.015  # two standard errors of 200 draws


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.0, 1.0), (0.95, 0.99, 0.9), (1.0, 1.0)])
def test_gaps_between_small_slices_cover(rates: tuple[float, ...]) -> None:
    rng, covered = np.random.default_rng(1), 0
    labels = [str(k) for k in range(len(rates)) for _ in range(8)]
    for _ in range(100):
        values = (rng.random(len(labels)) < np.repeat(rates, 8)).astype(float)
        gap = st.largest_gap(values, labels, minimum=5, seed=0)
        assert gap is not None and gap["low"] < gap["high"]
        covered += gap["low"] <= max(rates) - min(rates) <= gap["high"]
    assert covered >= 100 * NOMINAL


OWN = {"num_actions": 64, "span": 1, "temperature": 2.0, "inverse_dynamics_layers": 2, "policy_layers": 2}


def finalists(rewards: list[list[float]], sizes: tuple[int, ...] = (64, 16, 128)) -> list[CodesTrial]:
    return [
        CodesTrial(settings=OWN | {"num_actions": n}, measures={}, score=0.1, updates=1, cloned=True, reward=reward)
        for n, reward in zip(sizes, reward_intervals(rewards), strict=True)
    ]


def recommendations(gains: tuple[float, float, float], searches: int = 400) -> list[int]:
    """Recommended numbers of codes: each finalist two seeds with a spread of 0.03."""
    rng = np.random.default_rng(2)
    drawn = [(rng.normal(0.6, 0.03, (3, 2)) + np.array(gains)[:, None]).tolist() for _ in range(searches)]
    return [recommended(finalists(rewards), OWN).settings["num_actions"] for rewards in drawn]


def test_equal_finalists_keep_the_configs_own_setting() -> None:
    assert np.mean([n != 64 for n in recommendations((0.0, 0.0, 0.0))]) <= 0.05


def test_a_better_finalist_is_found() -> None:
    assert np.mean([n == 128 for n in recommendations((0.0, 0.0, 0.2))]) > 0.9


def test_equal_finalists_are_said_not_to_be_told_apart() -> None:
    same = finalists([[0.61, 0.58], [0.62, 0.64], [0.60, 0.65]])
    assert len(equals(same)) == 3
    assert "3 of 3 finalists are not told apart by 2 seeds each" in verdict(same, OWN)
    assert "the config's own setting is kept" in verdict(same, OWN)
    others = finalists([[0.1, 0.12], [0.62, 0.64], [0.60, 0.65]])
    assert recommended(others, OWN).settings["num_actions"] == 16, "the fewest codes among equals"
    once = finalists([[0.1], [0.62], [0.60]])
    assert recommended(once, OWN).settings == OWN, "one seed each tells nothing apart"
    late = finalists([[0.1], [0.62], []])
    assert "3 of 3 finalists are not told apart by 0 or 1 seeds each" in verdict(late, OWN)
    unrun = finalists([[], [0.62, 0.64], [0.60, 0.65]])
    assert recommended(unrun, OWN).settings == OWN, "what was not run cannot be worse"
