"""Codes that last for several tokens: where they begin and end, that labels see their span and nothing beyond, and
decoding with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from latent_control import LatentActionConfig, LatentActionLM
from latent_control.analysis.likelihood import latent_speaker
from latent_control.analysis.measures import codebook_measures, marginal_measures
from latent_control.records import TokenBatch
from latent_control.spans import lay_spans

MakeModel = Callable[..., LatentActionLM]
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1, 1, 1]], dtype=torch.bool)


def test_spans_begin_with_the_response_and_end_with_it() -> None:
    """Positions 2 to 6 of the first row produce a response of five tokens: two, two and one."""
    spans = lay_spans(MASK, 2)
    assert spans.starts.int().tolist() == [[0, 0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 0, 1, 0, 1]]
    assert spans.reads[0, 2:7].tolist() == [4, 4, 6, 6, 7]
    assert spans.reads[1][MASK[1]].tolist() == [2, 2, 3, 7, 7, 8]
    assert spans.number.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6]


def test_spans_of_one_token_read_one_further() -> None:
    spans = lay_spans(MASK, 1)
    assert torch.equal(spans.starts, MASK) and torch.equal(spans.reads, torch.arange(1, 9).expand(2, 8))
    logits = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spans.labels(logits), logits[:, 1:])


def test_looking_further_ahead_stops_at_the_end_of_the_response() -> None:
    assert lay_spans(MASK, 1, look_ahead=3).reads[0, 2:7].tolist() == [5, 6, 7, 7, 7]


def test_a_look_ahead_shorter_than_the_span_is_refused() -> None:
    with pytest.raises(ValueError, match="look_ahead=1 must be at least the span of 2 tokens"):
        LatentActionConfig(num_actions=4, span=2, look_ahead=1)


@torch.no_grad()
@pytest.mark.parametrize("span", [1, 2, 3])
def test_labels_see_their_span_and_nothing_beyond(
    make_model: MakeModel, randomise: Callable[[LatentActionLM], LatentActionLM], span: int
) -> None:
    model = randomise(make_model(span=span))
    ids = torch.randint(5, 40, (1, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 9, dtype=torch.bool)
    spans = model.spans(mask)
    before = spans.labels(model.inverse_dynamics_logits(model.features(ids)))
    for place in range(1, 10):
        changed = ids.clone()
        changed[0, place] = 41
        after = spans.labels(model.inverse_dynamics_logits(model.features(changed)))
        differs = (after != before).any(-1)[0].tolist()
        # Token ``place`` is the first or a later one of the span that begins at ``begin``; earlier spans end before it.
        begin = (place - 1) // span * span
        assert not any(differs[:begin]) and differs[begin]


@torch.no_grad()
@pytest.mark.parametrize("span", [1, 2, 3])
def test_decoding_holds_each_code(
    make_model: MakeModel, randomise: Callable[[LatentActionLM], LatentActionLM], span: int
) -> None:
    """Codes change only where a span begins; tokens and log-probabilities are those of the full forward pass."""
    model = randomise(make_model(span=span)).eval()
    ids = torch.randint(5, 40, (3, 4), generator=torch.Generator().manual_seed(2))
    out = model.generate(ids, max_new_tokens=[7, 5, 8], seed=3, stop_token=-1, repeats=1)
    for row in range(3):
        length = int(out.lengths[row])
        actions, tokens = out.actions[row, :length], out.tokens[row, :length]
        held = torch.arange(length) // span * span
        assert torch.equal(actions, actions[held])
        full = torch.cat([ids[row], tokens])[None]
        features = model.features(full[:, :-1])
        log_probs = torch.log_softmax(model.policy_logits(features)[0, 3:], -1)
        expected = log_probs.gather(-1, actions[:, None])[:, 0].masked_fill(torch.arange(length) != held, 0.0)
        assert torch.allclose(out.action_logp[row, :length], expected, atol=1e-4)
        codes = torch.cat([torch.zeros(3, dtype=torch.long), actions])[None]
        assert torch.equal(model.world_logits(features, codes)[0, 3:].argmax(-1), tokens)
        alone = model.generate(ids[row : row + 1], max_new_tokens=length, row_seeds=[0], stop_token=-1)
        again = model.generate(
            ids[row].expand(3, -1), max_new_tokens=length, row_seeds=[5, 0, 9], stop_token=-1, batch_size=2
        )
        assert torch.equal(again.actions[1], alone.actions[0]) and torch.equal(again.tokens[1], alone.tokens[0])
    assert len(set(out.actions.flatten().tolist())) > 2


@torch.no_grad()
def test_marginal_of_a_span_by_enumeration(
    make_model: MakeModel, randomise: Callable[[LatentActionLM], LatentActionLM]
) -> None:
    model = randomise(make_model(span=2))
    ids = torch.randint(5, 40, (1, 6), generator=torch.Generator().manual_seed(4))
    # produced at 2, 3 and 4: spans of two tokens and of one
    response = torch.tensor([[False, False, False, True, True, True]])
    batch = TokenBatch(input_ids=ids, attention_mask=torch.ones_like(ids), response_mask=response)
    features = model.features(ids)
    total = torch.zeros(())
    for begin, end in ((2, 4), (4, 5)):
        policy = torch.softmax(model.policy_logits(features)[0, begin], -1)
        chance = torch.zeros(())
        for code in range(model.config.num_actions):
            world = torch.softmax(model.world_logits(features, torch.full_like(ids, code))[0], -1)
            chance = chance + policy[code] * torch.stack([world[t, ids[0, t + 1]] for t in range(begin, end)]).prod()
        total = total - chance.log()
    found = marginal_measures(model, [batch])
    assert found["nll_marginal"] == pytest.approx(float(total) / 3, rel=1e-4)
    base = torch.log_softmax(model.base.lm(ids).logits[0], -1)
    assert found["nll_base_same"] == pytest.approx(-float(sum(base[t, ids[0, t + 1]] for t in (2, 3, 4))) / 3, rel=1e-4)
    assert codebook_measures(model, [batch])["nll_codes"] > 0


@torch.no_grad()
def test_a_span_told_token_by_token_is_told_whole(
    make_model: MakeModel, randomise: Callable[[LatentActionLM], LatentActionLM]
) -> None:
    """The next-token distributions of a latent speaker multiply to the marginal of the whole spans."""
    model = randomise(make_model(span=3))
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(5))
    response = torch.ones_like(ids, dtype=torch.bool)
    response[:, :2] = False
    batch = TokenBatch(input_ids=ids, attention_mask=torch.ones_like(ids), response_mask=response)
    log_probs = latent_speaker(model)(batch)(torch.arange(14))
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(14), atol=1e-5)
    told = -log_probs.gather(-1, ids[:, 2:].reshape(-1, 1)).mean()
    assert float(told) == pytest.approx(marginal_measures(model, [batch])["nll_marginal"], rel=1e-4)
