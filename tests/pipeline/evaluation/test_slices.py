"""Slices by metadata: labels, unknown fields, a planted bias that must be found."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.slices import field_problems, flat, labels, sliced
from pipeline.evaluation.statistics import exact_interval

NUMBERS = [{"target": t, "numbers": (1,) * (2 + t % 2), "kind": {"group": "ab"[t % 2]}} for t in range(40)]


def test_labels_by_kind_of_value() -> None:
    assert labels("kind.group", NUMBERS)[:3] == ["a", "b", "a"]
    assert labels("numbers", NUMBERS)[:3] == ["length 2", "length 3", "length 2"]
    assert sorted(set(labels("target", NUMBERS))) == ["0 to 9", "10 to 19", "20 to 29", "30 to 39"]
    assert labels("x", [{"x": 1}, {"x": 2}, {}, {"x": True}]) == ["1", "2", "missing", "True"]
    many = labels("x", [{"x": "often"}] * 3 + [{"x": f"word {i}"} for i in range(40)])
    assert many[0] == "often"
    assert len(set(many)) == 21
    assert many[-1] == "other"


def test_an_unknown_field_names_the_near_one_and_all() -> None:
    assert dict(flat(NUMBERS[1])) == {"target": 1, "numbers": (1, 1, 1), "kind.group": "b"}
    (message,) = field_problems(["numbers", "targt"], NUMBERS)
    assert message.startswith("evaluation.slices[1]: no prompt has the metadata field targt; did you mean target?")
    assert message.endswith("the fields there are: target, numbers, kind.group")
    assert field_problems(["target"], NUMBERS) == []
    assert "no metadata" in field_problems(["a"], [{}])[0]


def test_a_planted_bias_is_the_gap() -> None:
    groups = labels("kind.group", NUMBERS)
    sampled = np.array([1.0 if group == "a" else 0.25 for group in groups])
    outcomes = {"sampled": sampled, "greedy": np.ones(40)}
    found = sliced(outcomes, {"kind.group": groups, "target": labels("target", NUMBERS)}, minimum=10, seed=0)
    assert found["slice_gap"] == 0.75, "the field with the largest gap"
    # 20 prompts each; at 97.5 % a rate of 1 is at least (0.0125)^(1/20).
    wanted = [0.0125 ** (1 / 20) - exact_interval(5, 20, 0.975)[1], 1 - exact_interval(5, 20, 0.975)[0]]
    assert found["slice_gap_interval"] == pytest.approx(wanted)
    assert found["slice_gap_greedy"] == 0.0
    assert found["slices"]["kind.group"]["b"] == {
        "prompts": 20,
        "sampled": 0.25,
        "sampled_interval": exact_interval(5, 20),
        "greedy": 1.0,
        "greedy_interval": exact_interval(20, 20),
    }
    assert found["slice_gaps"]["kind.group"]["sampled"]["smallest"] == "b"
    assert found["slice_gaps"]["target"]["sampled"]["gap"] == pytest.approx(0.0)
    assert list(found["slices"]["target"]) == ["0 to 9", "10 to 19", "20 to 29", "30 to 39"]


def test_no_gap_without_two_large_slices() -> None:
    found = sliced(
        {"sampled": np.ones(40), "greedy": np.ones(40)},
        {"kind.group": labels("kind.group", NUMBERS)},
        minimum=21,
        seed=0,
    )
    assert "slice_gap" not in found
    assert found["slice_gaps"] == {"kind.group": {"sampled": None, "greedy": None}}


@pytest.mark.parametrize("first", [0, 20240101, 1_700_000_000, 1.5e15, 0.123456701])
def test_bins_of_numbers_that_differ_late_are_apart(first: float) -> None:
    """Dates as numbers were one slice, so that no gap was looked for."""
    step = first if 0 < first < 1 else 1
    found = labels("day", [{"day": first + step * 1e-6 * i if first < 1 and first else first + i} for i in range(40)])
    assert [found.count(name) for name in dict.fromkeys(found)] == [10, 10, 10, 10]


def test_equal_numbers_are_one_slice_however_written() -> None:
    assert labels("x", [{"x": 1}, {"x": 1.0}, {"x": 2.5}]) == ["1", "1", "2.5"]
