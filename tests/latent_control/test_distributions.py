"""The distribution codes are sampled from: temperature, truncation, inverse-transform sampling, named random
streams."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from latent_control.distributions import action_log_probs, rollout_seed, sample_actions, uniform_streams

LOGITS = torch.log(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))


def test_probabilities_by_hand() -> None:
    assert torch.allclose(action_log_probs(LOGITS).exp(), torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    squares = torch.tensor([[1.0, 4.0, 9.0, 16.0]]) / 30
    assert torch.allclose(action_log_probs(LOGITS, temperature=0.5).exp(), squares)


def test_temperature_zero_counts_as_one() -> None:
    assert torch.equal(action_log_probs(LOGITS, temperature=0.0), action_log_probs(LOGITS))


def test_top_k_keeps_the_k_largest_and_renormalises() -> None:
    probabilities = action_log_probs(LOGITS, top_k=2).exp()
    assert torch.allclose(probabilities, torch.tensor([[0.0, 0.0, 3 / 7, 4 / 7]]))
    assert torch.equal(action_log_probs(LOGITS, top_k=4), action_log_probs(LOGITS))
    assert torch.equal(action_log_probs(LOGITS, top_k=9), action_log_probs(LOGITS))


def test_top_k_breaks_ties_to_exactly_k() -> None:
    assert torch.isfinite(action_log_probs(torch.zeros(5, 6), top_k=2)).sum(-1).tolist() == [2] * 5


def test_keep_adds_the_sampled_action_to_the_support() -> None:
    outside = action_log_probs(LOGITS, top_k=2, keep=torch.tensor([0])).exp()
    assert torch.allclose(outside, torch.tensor([[1 / 8, 0.0, 3 / 8, 4 / 8]]))
    inside = action_log_probs(LOGITS, top_k=2, keep=torch.tensor([3]))
    assert torch.equal(inside, action_log_probs(LOGITS, top_k=2))


def test_keep_has_a_finite_gradient_when_the_action_left_the_top() -> None:
    logits = LOGITS.clone().requires_grad_()
    action_log_probs(logits, top_k=2, keep=torch.tensor([0]))[0, 0].backward()
    # d log p_0 = onehot - p over the support {0, 2, 3}
    assert torch.allclose(logits.grad, torch.tensor([[7 / 8, 0.0, -3 / 8, -4 / 8]]))


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    log_probs = action_log_probs(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert log_probs.dtype == torch.float32
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(4), atol=1e-6)


@pytest.mark.parametrize(
    ("uniform", "action"),
    [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.5999, 2), (0.6001, 3), (0.9999, 3)],
)
def test_inverse_transform_by_hand(uniform: float, action: int) -> None:
    assert sample_actions(action_log_probs(LOGITS), torch.tensor([uniform], dtype=torch.float64)).tolist() == [action]


def test_frequencies_match_probabilities() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -3.0])
    count = 40_000
    for settings in ({}, {"temperature": 1.7}, {"temperature": 0.6, "top_k": 3}):
        log_probs = action_log_probs(logits, **settings)
        uniforms = uniform_streams([11], count)[0]
        drawn = torch.bincount(sample_actions(log_probs.expand(count, -1), uniforms), minlength=6) / count
        error = (drawn - log_probs.exp()).abs()
        # five standard deviations of a share; a share of zero must stay zero
        assert bool((error <= 5 * (log_probs.exp() / count).sqrt()).all()), (settings, drawn)


def test_never_an_action_outside_the_support() -> None:
    """The uniforms nearest to 0 and 1 fall on the first and last action that is possible, not on a neighbour."""
    logits = torch.randn(2000, 9, generator=torch.Generator().manual_seed(1))
    logits[:, 0] = logits[:, -1] = -50.0  # truncated at both ends
    log_probs = action_log_probs(logits, top_k=4)
    for uniform in (0.0, math.ulp(0.0), 1 - 2**-53):
        chosen = sample_actions(log_probs, torch.full((2000,), uniform, dtype=torch.float64))
        assert bool(torch.isfinite(log_probs.gather(-1, chosen[:, None])).all()), uniform


def test_a_stream_does_not_depend_on_its_neighbours_or_length() -> None:
    alone, together = uniform_streams([5], 7), uniform_streams([9, 5, 1], 12)
    assert torch.equal(alone[0], together[1, :7])
    assert not torch.equal(together[0], together[1])
    assert float(together.min()) >= 0.0
    assert float(together.max()) < 1.0


def test_no_rows_no_streams() -> None:
    assert uniform_streams([], 4).shape == (0, 4)


def test_streams_are_uniform_across_neighbouring_seeds() -> None:
    first = uniform_streams([rollout_seed(0, row) for row in range(4000)], 1)[:, 0].numpy()
    counts = np.histogram(first, bins=10, range=(0, 1))[0]
    # chi square with 9 degrees of freedom: 27.9 has probability 0.001 (the seeds are fixed)
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9


def test_rollout_seed_depends_on_every_part() -> None:
    seeds = [rollout_seed(*parts) for parts in ((0, 1, 2), (1, 0, 2), (0, 2, 1), (0, 1, 3), (0, 1), (5, 1, 2))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert rollout_seed(0, 1, 2) == seeds[0]
