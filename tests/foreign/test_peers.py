"""Advantages, losses and KL beside those of verl and TRL (``tests/oracles/make_*.py`` wrote what they answered)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.recipes import RECIPES as PRESETS
from latent_control.algorithms import ALGORITHMS, AdvantageEstimate, Outcomes
from latent_control.losses import clipped_surrogate, kl_divergence, value_loss
from learners.learner import constant_scale, position_weights
from rollout_workers.tasks.rewards import overlong

ORACLES = Path(__file__).resolve().parent.parent / "oracles"
sys.path.insert(0, str(ORACLES))
from cases import CAP, LENGTHS, LIMIT, RECIPES, SEEDS, WINDOW, Case, case, distributions  # noqa: E402

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


def recipe(one: Case, advantages: torch.Tensor, name: str) -> tuple[float, torch.Tensor]:
    """Our loss of one of ``RECIPES``, and its gradient by the new log-probabilities [B, T]."""
    asked = RECIPES[name]
    mask, sampler, old = (torch.from_numpy(x) for x in (one.mask, one.sampler, one.old))
    new = torch.from_numpy(one.new).requires_grad_()
    weights = position_weights(mask, asked["loss_mean"]).double()
    truncated = {"proximal_logp": old[mask], "importance_cap": CAP} if name == "truncated" else {}
    found, _ = clipped_surrogate(
        new[mask][:, None],
        actions=torch.zeros(int(mask.sum()), dtype=torch.long),
        action_logp=(sampler if truncated else old)[mask],
        advantages=advantages[mask],
        weights=weights[mask],
        clip_low=asked["clip_low"],
        clip_high=asked["clip_high"],
        sequences=mask.nonzero()[:, 0] if asked.get("ratio") == "sequence" else None,
        surrogate=asked.get("surrogate", "ppo"),
        **truncated,
    )
    found = found * (constant_scale(mask, mask.shape[1]) if asked["loss_mean"] == "constant" else 1.0)
    found.backward()
    assert new.grad is not None
    return float(found.detach()), new.grad


def assert_same(found: tuple[float, torch.Tensor], theirs: dict[str, Any], times: float = 1.0) -> None:
    assert found[0] * times == pytest.approx(theirs["loss"], abs=1e-5)
    assert torch.allclose(found[1] * times, torch.tensor(theirs["gradient"], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RECIPES)
def test_each_recipes_loss_and_gradient_are_trls(name: str, seed: int) -> None:
    one = case(seed)
    centred = torch.from_numpy(one.rewards - one.rewards.mean())[:, None].expand(one.mask.shape)
    assert_same(recipe(one, centred, name), TRL["answers"][seed]["recipes"][name])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RECIPES)
def test_each_recipes_loss_and_gradient_are_verls(name: str, seed: int) -> None:
    one = case(seed)
    assert_same(recipe(one, theirs(seed, "rloo"), name), VERL["answers"][seed]["recipes"][name])


def test_the_recipes_compared_are_those_on_offer_but_for_the_width_of_two_clips() -> None:
    """Those of gspo and cispo would not bite on the cases."""
    assert RECIPES.keys() - {"truncated"} == PRESETS.keys()
    for name, preset in PRESETS.items():
        wanted = {key.partition(".")[2]: value for key, value in preset.items()}
        same = RECIPES[name].keys() - ({"clip_low", "clip_high"} if name in ("gspo", "cispo") else set())
        defaults = {"clip_low": 0.2, "clip_high": 0.2}
        assert {key: RECIPES[name][key] for key in same} == {key: {**defaults, **wanted}[key] for key in same}


def test_every_recipes_answers_differ_from_the_others() -> None:
    for peer in (TRL, VERL):
        gradients = [[answer["recipes"][name]["gradient"] for answer in peer["answers"]] for name in RECIPES]
        assert all(a != b for i, a in enumerate(gradients) for b in gradients[:i])


def test_the_soft_overlong_penalty_is_trls() -> None:
    found = [overlong(length, LIMIT, WINDOW / LIMIT) for length in LENGTHS]
    assert found == pytest.approx(TRL["overlong"]) and TRL["overlong"] == [0.0, 0.0, 0.0, -0.05, -0.5, -0.95, -1.0]


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
