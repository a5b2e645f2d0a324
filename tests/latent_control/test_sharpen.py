"""The temperature fit after cloning: what it looks for, and that it is built into the policy exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rl_tools import rl_config
from transformers import AutoTokenizer

from latent_control import LatentActionLM
from pipeline.stages import fit_temperature

pytest_plugins = ("rl_fixtures",)


def test_signal_is_what_differs_within_a_prompt() -> None:
    assert fit_temperature.signal([[0.0, 1.0], [1.0, 1.0]]) == 0.25
    assert fit_temperature.signal([[0.0, 0.0], [1.0, 1.0]]) == 0.0, "prompts may differ as they like"
    assert fit_temperature.signal([[], [1.0]]) == 0.0


@pytest.mark.parametrize(
    ("best", "rewards"), [(0.5, {1.0: [[0.0, 0.0]], 0.5: [[0.0, 1.0]]}), (1.0, {1.0: [[0.0, 1.0]], 0.5: [[1.0, 1.0]]})]
)
def test_the_best_temperature_is_built_in(
    tiny_base: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    best: float,
    rewards: dict[float, list[list[float]]],
) -> None:
    monkeypatch.setattr(
        fit_temperature, "rewards_at", lambda model, config, tokenizer, temperature: rewards[temperature]
    )
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    before = model.policy.head.weight.clone()
    found = fit_temperature.sharpen(model, rl_config(tiny_base), None, (1.0, 0.5))
    assert found["fitted_temperature"] == best and torch.equal(model.policy.head.weight, before / best)
    assert (
        found["signal_at_0.5"] == fit_temperature.signal(rewards[0.5])
        and found["reward_at_0.5"] == sum(rewards[0.5][0]) / 2
    )


def test_a_sharpened_policy_plays_as_the_plain_one_at_that_temperature(tiny_base: Path, tiny_checkpoint: Path) -> None:
    """The same random streams give the same rollouts, so the same rewards."""
    config, tokenizer = rl_config(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    cold = fit_temperature.rewards_at(model, config, tokenizer, 0.5)
    assert len(cold) == 64 and all(len(group) == 8 for group in cold)
    ids = torch.tensor([[7, 8, 9]])
    plain = model.generate(ids, max_new_tokens=8, temperature=0.5, seed=1, repeats=16)
    fit_temperature.sharpen(model, config, tokenizer, (0.5,))
    sharp = model.generate(ids, max_new_tokens=8, temperature=1.0, seed=1, repeats=16)
    assert torch.equal(plain.actions, sharp.actions) and torch.allclose(plain.action_logp, sharp.action_logp, atol=1e-5)
