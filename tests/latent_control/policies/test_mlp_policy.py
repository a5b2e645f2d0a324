"""The latent policy without attention: what it reads, how it decodes, how it is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_control import LatentActionLM
from latent_control.config import LatentActionConfig
from latent_control.decoding.engine import Engine
from latent_control.decoding.rescoring import rescored_logp
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.policies.mlp import MlpPolicy
from latent_control.pretrained import CONFIG, load_policy, with_policy

MLP: dict[str, Any] = {"policy_kind": "mlp", "policy_width": 24}


@pytest.fixture(scope="module", params=["final", "both"])
def model(request: pytest.FixtureRequest, make_model: Callable[..., LatentActionLM]) -> LatentActionLM:
    """Eight codes and an MLP policy that is not what it was at the start."""
    made = make_model(**MLP, policy_reads=request.param)
    generator = torch.Generator().manual_seed(4)
    for parameter in made.policy.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


PROMPTS = ([5, 9, 11], [7], [4, 4, 8, 21, 30])


def padded(prompts: tuple[list[int], ...] = PROMPTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Left padded ids and mask."""
    widest = max(map(len, prompts))
    rows = [[0] * (widest - len(p)) + p for p in prompts]
    masks = [[0] * (widest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(rows), torch.tensor(masks)


def test_a_position_reads_its_own_state_alone(model: LatentActionLM) -> None:
    states = torch.randn(2, 5, model.policy.state_width, generator=torch.Generator().manual_seed(1))
    whole = model.policy(states)
    changed = states.clone()
    changed[:, [0, 1, 3, 4]] += 1
    assert torch.equal(model.policy(changed)[:, 2], whole[:, 2]) and not torch.equal(model.policy(changed), whole)
    mask = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(model.policy.logits_at(states, mask), whole[mask])


def test_its_size_by_hand(model: LatentActionLM) -> None:
    """Norm 2 D, D W + W, twice (2 W + 2 (2 W W) + 3 W), norm 2 W, W N; D = 32 (or 64 of two states), W = 24, N = 8."""
    sizes = sum(p.numel() for p in model.policy.parameters())
    width = 64 if model.config.policy_reads == "both" else 32
    assert sizes == 2 * width + (width * 24 + 24) + 2 * (48 + 2 * 48 * 24 + 72) + 48 + 24 * 8
    assert model.parameter_counts()["policy"] == sizes


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_equals_a_pass_over_what_was_written(
    model: LatentActionLM, batch_size: int | None, temperature: float
) -> None:
    """Codes' log-probabilities, tokens and shipped states against the base's own forward pass."""
    ids, mask = padded()
    made = model.generate(
        ids, mask, max_new_tokens=7, repeats=3, seed=5, batch_size=batch_size, temperature=temperature,
        return_features=True,
    )  # fmt: skip
    assert made.features is not None and len(set(made.actions[made.actions >= 0].tolist())) > 2
    for row, length in enumerate(made.lengths.tolist()):
        prompt, tokens, codes = PROMPTS[row // 3], made.tokens[row, :length], made.actions[row, :length]
        fed = torch.tensor([[*prompt, *tokens[:-1].tolist()]])
        features = model.features(fed)
        read = features.read(model.config.policy_state)[0, len(prompt) - 1 :]
        torch.testing.assert_close(made.features[row], read, rtol=0, atol=1e-4)
        world = model.world_logits(features, torch.cat([torch.zeros(len(prompt) - 1).long(), codes])[None])
        assert world[0, len(prompt) - 1 :].argmax(-1).tolist() == tokens.tolist()
        if temperature:
            wanted = torch.log_softmax(model.policy(read), -1).gather(-1, codes[:, None])[:, 0]
            torch.testing.assert_close(made.action_logp[row, :length], wanted, rtol=0, atol=1e-4)
            (found,) = rescored_logp(
                model.base, model.actor(), [prompt], [tokens.tolist()], [codes.tolist()], temperature=1.0, top_k=None
            )
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_new_version_under_way_asks_nothing_of_the_caches(model: LatentActionLM, batch_size: int | None) -> None:
    """The actor keeps no second cache; after the change, choices are those of the new weights on the same states, those
    of rows that waited for a slot meanwhile, too."""
    ids, mask = padded()
    changing = MlpPolicy(model.policy.state_width, 8, layers=2, width=24)
    changing.load_state_dict(model.policy.state_dict())
    other = {name: t + 0.5 * torch.randn(t.shape, generator=torch.Generator().manual_seed(2)) for name, t in
             model.policy.state_dict().items()}  # fmt: skip
    steps = iter(range(100))

    def refresh() -> int:
        if next(steps) == 5:
            changing.load_state_dict(other)
        return int(next(iter(changing.parameters())).equal(next(iter(other.values()))))

    own, model.policy = model.policy, changing
    try:
        params = SamplingParams(
            max_new_tokens=[2, *[8] * 5], seed=1, repeats=2, batch_size=batch_size, stop_token=-1, return_features=True
        )
        with torch.no_grad():
            engine = Engine(model.base, model.actor(), params, ids, mask, refresh=refresh)
            made = engine.run()
    finally:
        model.policy = own
    assert engine.stack_cache is None and made.features is not None and {0, 1} <= set(made.versions.flatten().tolist())
    for row, length in enumerate(made.lengths.tolist()):
        for place in range(length):
            policy = changing if made.versions[row, place] == 1 else model.policy
            logits = torch.log_softmax(policy(made.features[row][place]).detach(), -1)
            wanted = logits[made.actions[row, place]]
            assert abs(float(made.action_logp[row, place] - wanted)) < 1e-4


def test_it_is_stored_and_loaded(model: LatentActionLM, base: Any, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "whole", bundle_base=True)
    loaded = LatentActionLM.from_pretrained(folder)
    ids, mask = padded()
    one, other = (m.generate(ids, mask, max_new_tokens=6, seed=3) for m in (model, loaded))
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.actions, other.actions)
    alone = load_policy(folder)
    assert isinstance(alone, MlpPolicy)
    changed = {name: tensor.numpy() + 1 for name, tensor in alone.state_dict().items() if name.startswith("head")}
    with_policy(folder, tmp_path / "head", changed)
    again = LatentActionLM.from_pretrained(tmp_path / "head").policy.state_dict()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(again[name], tensor + 1 if name.startswith("head") else tensor)


def test_a_checkpoint_from_before_is_one_of_blocks(make_model: Callable[..., LatentActionLM], tmp_path: Path) -> None:
    folder = make_model().save_pretrained(tmp_path / "old", bundle_base=True)
    saved = json.loads((folder / CONFIG).read_text())
    for name in ("policy_kind", "policy_width"):
        saved["latent_actions"].pop(name)
    saved["latent_actions"]["policy_reads"] = "late"
    (folder / CONFIG).write_text(json.dumps(saved))
    assert type(load_policy(folder)).__name__ == "DecoderStack"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_kind": "mlp", "policy_reads": "late"}, "policy_reads='late' is for policy_kind='blocks'"),
        ({"policy_reads": "both"}, "policy_reads='both' is for policy_kind='mlp'"),
        ({"policy_width": 64}, "policy_width=64 is for policy_kind='mlp'"),
        ({"policy_kind": "mlp", "policy_width": 0}, "policy_width=0 must be a positive whole number"),
        ({"policy_kind": "lstm"}, "policy_kind='lstm' must be one of"),
    ],
)
def test_shapes_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentActionConfig(**settings)


def test_whatever_reads_the_policys_state_has_its_width(model: LatentActionLM) -> None:
    """The Q head of a search, too, which would not load states of two widths otherwise."""
    from pipeline.stages.q_head import new_head

    settings = type("Settings", (), {"hidden": 8, "support": 0.1})()
    features = model.features(torch.tensor([[5, 9, 11]]))
    states = features.read(model.config.policy_state)
    assert states.shape[-1] == model.config.state_width(model.base.width) == model.policy.state_width
    assert new_head(model, settings, 0)(states[0]).shape == (3, 8)
