"""Measures on text see every place of a response alike, however long they are: no rhythm leaves a place out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from latent_control import LatentActionLM
from latent_control.analysis.likelihood import LogProbs, latent_speaker, text_measures, token_speaker
from latent_control.analysis.measures import drawn, marginal_measures, reach_measures
from latent_control.decoding.action_decoder import base_actor
from latent_control.records import TokenBatch

MakeModel = Callable[..., LatentActionLM]


def batches_of(rows: int, length: int, prompt: int = 3, size: int = 16) -> list[TokenBatch]:
    """Answers of ``length`` tokens, each token its place."""
    ids = torch.cat([torch.full((rows, prompt), 40), torch.arange(length).expand(rows, -1)], 1)
    response = (torch.arange(prompt + length) >= prompt).expand(rows, -1)
    whole = TokenBatch(input_ids=ids, attention_mask=torch.ones_like(ids), response_mask=response)
    return [whole.rows(first, first + size) for first in range(0, rows, size)]


def by_place(nats: torch.Tensor) -> Callable[[TokenBatch], LogProbs]:
    """A model that is surprised by the token of place p by nats[p]."""

    def speak(batch: TokenBatch) -> LogProbs:
        places = batch.input_ids[:, 1:][batch.response_mask[:, 1:]]

        def log_probs(rows: torch.Tensor) -> torch.Tensor:
            chosen = torch.nn.functional.one_hot(places[rows], 64).bool()
            told = torch.exp(-nats[places[rows]])[:, None]
            return torch.where(chosen, told, (1 - told) / 63).log()

        return log_probs

    return speak


@pytest.mark.parametrize("length", [2, 3, 4, 6, 12, 13, 24, 36])
@pytest.mark.parametrize("positions", [256, 512, 1024])
def test_every_place_of_a_response_counts_alike(length: int, positions: int) -> None:
    """Every third place decides something; the others are nearly certain."""
    nats = torch.where(torch.arange(64) % 3 == 1, 2.0, 0.01)
    batches = batches_of(rows=2000 // length, length=length)
    found = text_measures(by_place(nats), by_place(nats), batches, positions=positions)
    assert found["nll"] == pytest.approx(float(nats[:length].mean()), abs=0.25)
    seen = torch.cat(
        [rows % length for _, rows in drawn(batches, [b.response_mask[:, 1:].sum() for b in batches], positions)]
    )
    expected = len(seen) / length
    assert (torch.bincount(seen, minlength=length) - expected).abs().max() < 4 * expected**0.5


def test_all_positions_are_measured_where_there_are_no_more_than_the_limit() -> None:
    """64 answers of 12 tokens, as the quickstart's evaluation has them."""
    nats = torch.linspace(0.0, 1.0, 64)
    found = text_measures(by_place(nats), by_place(nats), batches_of(64, 12))
    assert found["nll"] == pytest.approx(float(nats[:12].mean()), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("span", [1, 2])
def test_a_draw_estimates_what_all_positions_give(
    span: int, make_model: MakeModel, randomise: Callable[[LatentActionLM], LatentActionLM]
) -> None:
    model = randomise(make_model(span=span))
    batches = batches_of(96, 6)
    base = token_speaker(model.base, base_actor(model.base))
    for measure in (
        lambda positions: text_measures(latent_speaker(model), base, batches, positions=positions),
        lambda positions: marginal_measures(model, batches, positions=positions),
        lambda positions: reach_measures(model, batches, positions=positions),
    ):
        whole, part = measure(10_000), measure(192)
        assert part == pytest.approx(whole, rel=0.15, abs=0.05)
        assert measure(192) == part  # variants are compared on the same positions


@torch.no_grad()
def test_reach_counts_the_argmax_tokens_of_all_codes_at_every_position(
    make_model: MakeModel, randomise: Callable[[LatentActionLM], LatentActionLM]
) -> None:
    model = randomise(make_model())
    batches = batches_of(5, 4, size=2)
    covered, distinct = [], []
    for batch in batches:
        features = model.features(batch.input_ids)
        reached = [
            model.world_logits(features, torch.full_like(batch.input_ids, code)).argmax(-1)
            for code in range(model.config.num_actions)
        ]
        for row in range(len(batch.input_ids)):
            for t in range(2, 6):
                tokens = {int(r[row, t]) for r in reached}
                covered.append(int(batch.input_ids[row, t + 1]) in tokens)
                distinct.append(len(tokens))
    found = reach_measures(model, batches)
    assert found["distinct_tokens"] == pytest.approx(sum(distinct) / 20)
    assert found["coverage"] == pytest.approx(sum(covered) / 20)
