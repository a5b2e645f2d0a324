"""Codes forced or allowed by the caller, and a caller that watches and ends rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from latent_control import Generation, LatentActionLM
from latent_control.decoding.generate import generate
from latent_control.decoding.guide import make_guide
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.model import latent_actor

PROMPTS = torch.tensor([[0, 0, 1, 5, 9], [1, 7, 8, 9, 11]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def play(model: LatentActionLM, **arguments: Any) -> Generation:
    settings = {"max_new_tokens": 6, "temperature": 0.0, "stop_token": -1} | arguments
    return model.generate(PROMPTS, MASK, **settings)


def test_forced_codes_are_taken_and_the_policy_takes_the_rest(model: LatentActionLM) -> None:
    free = play(model)
    forced = [(int(code) + 1) % 8 for code in free.actions[0, :2]]
    out = play(model, codes=[forced[0], None, forced[1]])
    assert out.actions[:, 0].tolist() == [forced[0]] * 2
    assert out.actions[:, 2].tolist() == [forced[1]] * 2
    assert (out.action_logp[:, [0, 2]] == 0).all()
    assert (out.action_logp[:, [1, 3, 4, 5]] < 0).all()
    # What the policy chose after a forced prefix is what it chooses after those tokens.
    ids, mask = torch.cat([PROMPTS, out.tokens[:, :3]], 1), torch.cat([MASK, torch.ones(2, 3, dtype=torch.long)], 1)
    rest = model.generate(ids, mask, max_new_tokens=3, temperature=0.0, stop_token=-1)
    assert torch.equal(rest.actions, out.actions[:, 3:])


def test_a_forced_code_emits_its_most_likely_token(model: LatentActionLM) -> None:
    features = model.features(PROMPTS, MASK)
    for code in range(8):
        wanted = model.world_logits(features, torch.full_like(PROMPTS, code))[:, -1].argmax(-1)
        assert torch.equal(play(model, codes=[code], max_new_tokens=1).tokens[:, 0], wanted)


def test_codes_replay_a_sampled_generation(model: LatentActionLM) -> None:
    sampled = play(model, temperature=1.0, seed=3, stop_token=None, max_new_tokens=12)
    again = play(model, codes=sampled.actions, stop_token=None, max_new_tokens=12)
    assert torch.equal(again.tokens, sampled.tokens)
    assert again.finish_reasons == sampled.finish_reasons
    assert not torch.equal(play(model, max_new_tokens=12).tokens, sampled.tokens)


def test_allowed_codes_share_the_probability(model: LatentActionLM) -> None:
    for seed in range(4):
        out = play(model, allowed_codes=[2, 5], temperature=1.0, seed=seed)
        assert set(out.actions.unique().tolist()) <= {2, 5}
    logits = model.policy_logits(model.features(PROMPTS, MASK), MASK)[:, -1, [2, 5]]
    first = [2, 5].index(int(out.actions[0, 0]))
    torch.testing.assert_close(out.action_logp[0, 0], logits[0].log_softmax(-1)[first], atol=1e-5, rtol=0)
    greedy = play(model, allowed_codes=torch.tensor([False, False, True, False, False, True, False, False]))
    assert greedy.actions[0, 0] == [2, 5][int(logits[0].argmax())]


def test_each_row_has_its_own(model: LatentActionLM) -> None:
    free = play(model)
    other = (int(free.actions[1, 0]) + 3) % 8
    out = play(model, codes=[None, [other]], allowed_codes=[None, [other, 0]])
    assert torch.equal(out.tokens[0], free.tokens[0])
    assert out.actions[1, 0] == other
    assert set(out.actions[1].tolist()) <= {other, 0}
    # The rollouts of a prompt follow each other.
    twice = play(model, codes=[None, [other]], allowed_codes=[None, [other, 0]], repeats=2)
    assert torch.equal(twice.tokens, out.tokens.repeat_interleave(2, 0))


def test_rows_keep_their_guide_when_they_change_slots(model: LatentActionLM) -> None:
    codes = [[3, 4, 5, 6], [1, 2]]
    limits = [4, 6]
    alone = play(model, codes=codes, max_new_tokens=limits)
    assert torch.equal(play(model, codes=codes, max_new_tokens=limits, batch_size=1).tokens, alone.tokens)
    guide = make_guide(codes, None, rows=2, num_actions=8)
    static = generate(
        model.base,
        latent_actor(model),
        SamplingParams(max_new_tokens=limits, temperature=0.0, stop_token=-1, guide=guide),
        PROMPTS,
        MASK,
        static=True,
    )
    assert torch.equal(static.tokens, alone.tokens)
    assert alone.actions[0].tolist() == [3, 4, 5, 6, -1, -1]


def test_a_code_lasts_for_its_span(make_model: Callable[..., LatentActionLM]) -> None:
    model = make_model(span=2)
    sampled = play(model, temperature=1.0, seed=1)
    assert torch.equal(play(model, codes=sampled.actions).tokens, sampled.tokens)
    assert play(model, codes=[4]).actions[:, :2].tolist() == [[4, 4]] * 2
    with pytest.raises(
        ValueError, match="codes has 5 at place 1 and 4 where its span begins: one code lasts for 2 tokens"
    ):
        play(model, codes=[4, 5])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"codes": [8]}, "codes has 8: the model's codes are 0 to 7"),
        ({"codes": [-2]}, "codes has -2: the model's codes are 0 to 7"),
        ({"codes": [True]}, "a mask is a bool tensor"),
        ({"codes": [[1], [2], [3]]}, "codes is given for 3 rows, but there are 2"),
        ({"allowed_codes": []}, "allowed_codes is empty"),
        ({"allowed_codes": [9]}, "allowed_codes has 9"),
        ({"allowed_codes": torch.zeros(8, dtype=torch.bool)}, "allowed_codes is empty"),
        ({"allowed_codes": torch.ones(7, dtype=torch.bool)}, "a mask of 7 codes, but the model has 8"),
        ({"codes": [3], "allowed_codes": [1, 2]}, "codes forces code 3 at place 0, which allowed_codes leaves out"),
        ({"codes": [3], "level": "base"}, "level='base' has none"),
    ],
)
def test_wrong_guides_are_refused_with_the_value(model: LatentActionLM, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        play(model, **given)


def test_a_watch_sees_every_step_and_ends_rows(model: LatentActionLM) -> None:
    seen: list[tuple[int, int, int]] = []

    def watch(rows: list[int], tokens: list[int], codes: list[int]) -> list[bool]:
        seen.extend(zip(rows, tokens, codes, strict=True))
        return [row == 0 and sum(r == 0 for r, _, _ in seen) == 2 for row in rows]

    free, out = play(model), play(model, watch=watch)
    assert out.lengths.tolist() == [2, 6]
    assert out.finish_reasons == ("stop", "length")
    assert torch.equal(out.tokens[1], free.tokens[1])
    for row in range(2):
        length = int(out.lengths[row])
        assert [(t, c) for r, t, c in seen if r == row] == list(
            zip(out.tokens[row, :length].tolist(), out.actions[row, :length].tolist(), strict=True)
        )
