"""Statistics of an evaluation, by hand and by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pipeline.evaluation import statistics as st


@pytest.mark.parametrize(
    ("samples", "successes", "k"), [(4, 1, 2), (5, 2, 3), (6, 0, 2), (6, 6, 1), (5, 4, 3), (1, 1, 1)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_success(samples: int, successes: int, k: int) -> None:
    marks = [True] * successes + [False] * (samples - successes)
    subsets = list(itertools.combinations(marks, k))
    assert st.pass_at_k(np.array([successes]), samples, k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_by_hand() -> None:
    # n = 4, c = 0, 1, 2: 1 - C(4,2)/C(4,2), 1 - C(3,2)/6 = 1/2, 1 - C(2,2)/6 = 5/6
    assert st.pass_at_k(np.array([0, 1, 2]), 4, 2) == pytest.approx([0.0, 0.5, 5 / 6])
    with pytest.raises(ValueError, match="samples_per_prompt: 5"):
        st.pass_at_k(np.array([1]), 4, 5)


def test_wilson_by_hand() -> None:
    # (p + z2/2n +- z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n) at p = 1/2, n = 4, z = 2: (0.5 + 0.5 +- 2 sqrt(1/16 + 1/16))
    # / 2
    assert st.wilson(2, 4, z=2.0) == pytest.approx([0.5 - math.sqrt(0.125), 0.5 + math.sqrt(0.125)])
    assert st.wilson(0, 10)[0] == 0.0
    assert st.wilson(10, 10)[1] == 1.0


def test_students_quantiles_are_the_tables() -> None:
    assert [round(st.student(freedom), 3) for freedom in (1, 4, 9, 2.5)] == [12.706, 2.776, 2.262, 3.575]


def test_bootstrap_interval_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = st.interval(st.bootstrap_means(values, seed=1))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    always = st.paired_difference(values + 0.5, values, seed=1)
    assert always["mean"] == pytest.approx(0.5) and 0.4 < always["low"] < always["high"] <= 0.5 + 1e-9


def test_distinct_n_by_hand() -> None:
    # words a b a | a b: 2 of 5 differ; pairs ab ba | ab: 2 of 3; triples aba: 1 of 1; no four in a row
    assert [st.distinct_n(["a b a", "a b"], n) for n in (1, 2, 3, 4)] == [0.4, pytest.approx(2 / 3), 1.0, None]


def test_differing_pairs_is_brute_force_and_free_of_the_number_of_responses() -> None:
    responses = ["a", "b", "a", "c", "a"]
    pairs = list(itertools.combinations(responses, 2))
    assert st.differing_pairs(responses) == pytest.approx(sum(x != y for x, y in pairs) / len(pairs))
    rng = np.random.default_rng(2)
    means = [
        np.mean([st.differing_pairs([str(x) for x in rng.integers(4, size=size)]) for _ in range(3000)])
        for size in (2, 16)
    ]
    assert means == pytest.approx([0.75, 0.75], abs=0.02)


def test_mean_pairwise_cosine_is_brute_force() -> None:
    vectors = np.random.default_rng(3).normal(size=(5, 3))
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in itertools.combinations(vectors, 2)]
    assert st.mean_pairwise_cosine(vectors) == pytest.approx(np.mean(cosines))
    assert st.mean_pairwise_cosine(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])) == pytest.approx(1 / 3)


def test_quantile_bins_by_hand() -> None:
    assert st.quantile_bins([1, 9, 2, 3], 2) == ["1 to 2", "3 to 9", "1 to 2", "3 to 9"]
    assert set(st.quantile_bins([5, 5, 5, 5, 7], 4)) == {"5 to 5", "7 to 7"}, "equal numbers are never torn apart"
    sizes = np.unique(st.quantile_bins(list(range(100)), 4), return_counts=True)[1]
    assert sizes.tolist() == [25, 25, 25, 25]


def test_largest_gap_by_hand() -> None:
    values = np.array([1.0, 1, 1, 0, 0, 0, 0, 1, 1])
    labels = ["a", "a", "a", "a", "b", "b", "b", "b", "rare"]
    gap = st.largest_gap(values, labels, minimum=2, seed=0)
    assert gap is not None
    assert (gap["gap"], gap["largest"], gap["smallest"]) == (0.5, "a", "b")
    assert gap["low"] < 0.5 < gap["high"]
    assert st.largest_gap(values, labels, minimum=5, seed=0) is None


def test_a_gap_by_chance_is_called_so() -> None:
    rng = np.random.default_rng(4)
    labels = [str(i % 10) for i in range(400)]
    noise = st.largest_gap((rng.random(400) < 0.5).astype(float), labels, minimum=20, seed=0)
    real = st.largest_gap(np.array([float(label < "5") for label in labels]), labels, minimum=20, seed=0)
    assert noise is not None and real is not None
    assert noise["gap"] < 1.1 * noise["by_chance"], "ten groups of forty coins differ by chance"
    assert real["gap"] == 1.0 > 2 * real["by_chance"]
