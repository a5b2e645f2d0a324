"""Codes that emit the same token as one event: by hand, against enumeration, and what it does to the gradient's
variance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rl_tools import Config, make_learner, make_runner, sample, update, with_rewards

from latent_control import LatentActionLM
from latent_control.aliases import event_log_prob, pack, same_token, unpack
from latent_control.decoding.generate import generate
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.losses import clipped_surrogate
from latent_control.model import latent_actor

pytest_plugins = ("rl_fixtures",)
MakeModel = Callable[..., LatentActionLM]
Randomise = Callable[[LatentActionLM], LatentActionLM]


def test_events_are_classes_among_the_most_likely_codes() -> None:
    """Codes 0, 1, 2 are compared, 0 and 2 emit token 7. Code 4, which would emit it too, was not compared: it stands
    alone."""
    top, tokens = torch.tensor([[0, 1, 2]] * 4), torch.tensor([[7, 8, 7]] * 4)
    actions, chosen = torch.tensor([0, 1, 2, 4]), torch.tensor([7, 8, 7, 7])
    event = same_token(top, tokens, actions, chosen, 5)
    assert event.int().tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    log_probs = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.1]]).log().expand(4, 5)
    assert event_log_prob(log_probs, actions, event).exp().tolist() == pytest.approx([0.4, 0.2, 0.4, 0.1])
    assert event_log_prob(log_probs, actions, None).exp().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.1])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_packing_is_lossless(count: int) -> None:
    event = torch.rand(20, count, generator=torch.Generator().manual_seed(count)) < 0.4
    packed = pack(event)
    assert packed.dtype == torch.uint8 and packed.shape == (20, -(-count // 8))
    assert torch.equal(unpack(packed, count), event)


def test_same_expected_gradient_and_less_variance() -> None:
    """A bandit of four codes, three of which have one consequence: by enumeration of what may be sampled."""
    theta = torch.tensor([0.3, -0.2, 0.5, 0.1], requires_grad=True)
    event_of = torch.tensor([[1, 1, 1, 0]] * 3 + [[0, 0, 0, 1]], dtype=torch.bool)
    advantage = torch.tensor([1.0, 1.0, 1.0, -0.5])
    behaviour = torch.log_softmax(theta.detach(), -1)
    moments = {}
    for name, events in (("codes", None), ("events", event_of)):
        gradients = []
        for code in range(4):
            action, event = torch.tensor([code]), None if events is None else events[code : code + 1]
            loss, _ = clipped_surrogate(
                torch.log_softmax(theta, -1)[None],
                actions=action,
                action_logp=event_log_prob(behaviour[None], action, event),
                advantages=advantage[action],
                weights=torch.ones(1),
                clip_low=0.2,
                clip_high=0.2,
                events=event,
            )
            gradients.append(torch.autograd.grad(loss, theta)[0])
        rows, chances = torch.stack(gradients), behaviour.exp()[:, None]
        mean = (chances * rows).sum(0)
        moments[name] = mean, float((chances * (rows - mean) ** 2).sum())
    assert torch.allclose(moments["codes"][0], moments["events"][0], atol=1e-6)
    assert moments["events"][1] < 0.5 * moments["codes"][1]


@torch.no_grad()
@pytest.mark.parametrize("count", [3, 100])
def test_decoding_finds_the_codes_that_emit_the_same_token(
    make_model: MakeModel, randomise: Randomise, count: int
) -> None:
    model = randomise(make_model()).eval()
    model.codebook.data[1] = model.codebook.data[0]  # two codes that always agree
    ids, codes = torch.randint(5, 40, (4, 5), generator=torch.Generator().manual_seed(2)), model.config.num_actions
    out = generate(
        model.base,
        latent_actor(model),
        SamplingParams(max_new_tokens=6, seed=4, stop_token=-1, batch_size=3, aliases=count),
        ids,
    )
    assert out.events is not None and out.event_logp is not None
    shared = 0
    for row in range(4):
        features = model.features(torch.cat([ids[row], out.tokens[row, :-1]])[None])
        log_probs = torch.log_softmax(model.policy_logits(features)[0, 4:], -1)
        emitted = model.world_logits_of_all(features.final[0, 4:]).argmax(-1)
        compared = torch.zeros_like(emitted, dtype=torch.bool).scatter(
            1, log_probs.topk(min(count, codes), -1).indices, True
        )
        alone = torch.nn.functional.one_hot(out.actions[row], codes).bool()
        wanted = torch.where(
            (compared & alone).any(1, keepdim=True), compared & (emitted == out.tokens[row, :, None]), alone
        )
        found = unpack(out.events[row], codes)
        assert torch.equal(found, wanted)
        assert torch.allclose(out.event_logp[row], event_log_prob(log_probs, out.actions[row], wanted), atol=1e-4)
        shared += int((found.sum(1) > 1).sum())
    assert shared > 0
    plain = generate(
        model.base, latent_actor(model), SamplingParams(max_new_tokens=6, seed=4, stop_token=-1, batch_size=3), ids
    )
    assert torch.equal(plain.tokens, out.tokens) and plain.events is None


def test_worker_and_learner_agree_on_events(config: Config, tiny_checkpoint: Path) -> None:
    settings = config(improve={"equivalent_codes": 8, "importance_cap": 2.0, "mode": "async"})
    trained, runner = make_learner(settings, tiny_checkpoint), make_runner(settings, tiny_checkpoint)
    rewards = list(np.linspace(0, 1, 16))
    for _ in range(2):
        rollouts = with_rewards(sample(runner, trained, aliases=8), rewards)
        metrics = update(trained, rollouts)
        assert metrics["logp_gap"] < 2e-6 and metrics["importance_mean"] == pytest.approx(1.0, abs=1e-5)
    assert any((unpack(torch.from_numpy(r.events), 8).sum(1) > 1).any() for r in rollouts)
    assert all((r.event_logp >= r.action_logp - 1e-6).all() for r in rollouts)
