"""Advantages, losses and KL beside those of verl and TRL (``tests/oracles/make_*.py`` wrote what they answered)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latent_control.algorithms import ALGORITHMS, AdvantageEstimate, Outcomes
from latent_control.losses import clipped_surrogate, kl_divergence, value_loss
from learners.learner import position_weights

ORACLES = Path(__file__).resolve().parent.parent / "oracles"
sys.path.insert(0, str(ORACLES))
from cases import SEEDS, Case, case, distributions  # noqa: E402

VERL, TRL = (json.loads((ORACLES / f"{peer}.json").read_text()) for peer in ("verl", "trl"))
MEANS = ("token", "sequence")


def estimate(algorithm: str, one: Case) -> AdvantageEstimate:
    outcomes = Outcomes(
        rewards=torch.from_numpy(one.rewards),
        valid=torch.ones(len(one.rewards), dtype=torch.bool),
        group_size=one.group,
        taken=torch.from_numpy(one.mask),
        baselines=torch.from_numpy(one.baselines),
        values=torch.from_numpy(one.values),
        discount=one.discount,
        gae_lambda=one.gae_lambda,
    )
    return ALGORITHMS[algorithm].estimate(outcomes)


def theirs(seed: int, name: str) -> Any:
    return torch.tensor(VERL["answers"][seed][name], dtype=torch.float64)


def test_the_files_say_which_version_answered() -> None:
    assert (VERL["peer"], TRL["peer"]) == ("verl", "trl") and VERL["version"] and TRL["version"]
    assert len(VERL["answers"]) == len(TRL["answers"]) == len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("algorithm", ["rloo", "dr_grpo", "remax"])
def test_advantages_are_verls(algorithm: str, seed: int) -> None:
    found = estimate(algorithm, case(seed)).advantages.double()
    assert torch.allclose(found, theirs(seed, algorithm), atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_is_verls_but_for_the_standard_deviation(seed: int) -> None:
    """verl divides by the sample's (over G - 1) plus 1e-6, ours by the population's (over G) plus 1e-4."""
    one = case(seed)
    groups = one.rewards.reshape(-1, one.group)
    ours, sample = (np.repeat(groups.std(1, ddof=d), one.group)[:, None] for d in (0, 1))
    found = estimate("grpo", one).advantages.numpy() * (ours + 1e-4)
    assert np.allclose(found, theirs(seed, "grpo").numpy() * (sample + 1e-6), atol=2e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("algorithm", ["reinforce_pp", "ppo"])
def test_whitened_advantages_are_verls_but_for_the_degree_of_freedom(algorithm: str, seed: int) -> None:
    """verl's mean is off by 1e-8 of it (an epsilon in the count): equal rewards of 100.25 give 0.0009 there, 0 here."""
    one = case(seed)
    found, wanted = estimate(algorithm, one), theirs(seed, algorithm)
    count = int(one.mask.sum())
    assert torch.allclose(found.advantages.double(), wanted * (count / max(1, count - 1)) ** 0.5, rtol=1e-4, atol=2e-3)
    if found.returns is not None:
        mask = torch.from_numpy(one.mask)
        assert torch.allclose(found.returns[mask].double(), theirs(seed, "returns")[mask], atol=1e-4)


def loss(one: Case, advantages: torch.Tensor, mean: str) -> float:
    mask = torch.from_numpy(one.mask)
    new, old = (torch.from_numpy(x)[mask] for x in (one.new, one.old))
    found, _ = clipped_surrogate(
        new[:, None],
        actions=torch.zeros(len(new), dtype=torch.long),
        action_logp=old,
        advantages=advantages[mask],
        weights=position_weights(mask, mean)[mask],
        clip_low=one.clip_low,
        clip_high=one.clip_high,
    )
    return float(found)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mean", MEANS)
def test_the_clipped_surrogate_is_verls_and_trls(mean: str, seed: int) -> None:
    one = case(seed)
    assert loss(one, theirs(seed, "rloo"), mean) == pytest.approx(float(theirs(seed, f"loss_{mean}")), abs=1e-5)
    centred = torch.from_numpy(one.rewards - one.rewards.mean())[:, None].expand(one.mask.shape)
    assert loss(one, centred, mean) == pytest.approx(TRL["answers"][seed][mean], abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mean", MEANS)
def test_the_value_loss_is_verls(mean: str, seed: int) -> None:
    one = case(seed)
    mask = torch.from_numpy(one.mask)
    values, returns = torch.from_numpy(one.values)[mask], theirs(seed, "returns")[mask]
    found, _ = value_loss(values, returns, position_weights(mask, mean)[mask])
    assert float(found) == pytest.approx(float(theirs(seed, f"value_loss_{mean}")), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_exact_kl_is_the_mean_of_the_unbiased_estimators(seed: int) -> None:
    """k1 and k3 of one sample estimate what is summed over all actions here; k2 is biased."""
    policy, reference = map(torch.from_numpy, distributions(seed))
    exact = float(kl_divergence(policy[None], reference[None]))
    means = {kind: float((policy.exp() * theirs(seed, kind)).sum()) for kind in ("k1", "k2", "k3")}
    assert means["k1"] == pytest.approx(exact, abs=1e-6) and means["k3"] == pytest.approx(exact, abs=1e-6)
    assert means["k2"] != pytest.approx(exact, rel=1e-3)
