"""Cached decoding against the plainest loop there is: one full forward pass per token, one row at a time (method.md 7.2
to 7.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from latent_control import Generation, LatentActionLM
from latent_control.base_lm import BaseLM
from latent_control.decoding import slot_engine
from latent_control.decoding.action_decoder import base_actor
from latent_control.decoding.engine import Engine
from latent_control.decoding.generate import generate
from latent_control.decoding.prefill import PromptQueue, left_pad
from latent_control.decoding.sampling_params import SamplingParams, special_tokens
from latent_control.decoding.slot_memory import SlotMemory
from latent_control.distributions import action_log_probs, rollout_seed, sample_actions, uniform_streams
from latent_control.token_policy import Trains, token_actor, token_policy

VOCABULARY, END, PAD = 48, 2, 0
CLOSE = {"rtol": 0.0, "atol": 1e-4}


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Random prompts [P] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, P], mask [B, P]); padding holds a real token, so that a mask that is ignored shows."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 17), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


@torch.no_grad()
def plain_rollout(
    model: LatentActionLM,
    prompt: torch.Tensor,
    *,
    limit: int,
    stream: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop: int = -1,
) -> tuple[list[int], list[int], list[float]]:
    """(actions, tokens, log-probabilities) without any cache, batch or padding."""
    uniforms = uniform_streams([stream], limit)[0]
    row, actions, logps = prompt.tolist(), [], []
    for step in range(limit):
        features = model.features(torch.tensor([row]))
        log_probs = action_log_probs(model.policy_logits(features)[:, -1], temperature=temperature, top_k=top_k)
        action = (
            int(log_probs.argmax()) if temperature == 0 else int(sample_actions(log_probs, uniforms[step : step + 1]))
        )
        world = model.world_logits(features, torch.full((1, len(row)), action))[0, -1]
        actions.append(action), logps.append(float(log_probs[0, action])), row.append(int(world.argmax()))
        if row[-1] == stop:
            break
    return actions, row[len(prompt) :], logps


def check_row(generation: Generation, row: int, expected: tuple[list[int], list[int], list[float]]) -> None:
    """Row ``row`` equals ``expected``, and nothing follows its end."""
    actions, tokens, logps = expected
    length = int(generation.lengths[row])
    assert generation.tokens[row, :length].tolist() == tokens, row
    assert generation.actions[row, :length].tolist() == actions, row
    torch.testing.assert_close(generation.action_logp[row, :length], torch.tensor(logps), **CLOSE)
    assert bool((generation.tokens[row, length:] == PAD).all())
    assert bool((generation.actions[row, length:] == -1).all())
    assert bool((generation.action_logp[row, length:] == 0).all())


def same(one: Generation, other: Generation, width: int | None = None) -> None:
    """Both hold the same rollouts (in their first ``width`` columns)."""
    assert one.lengths.tolist() == other.lengths.tolist()
    assert one.finish_reasons == other.finish_reasons
    assert torch.equal(one.tokens[:, :width], other.tokens[:, :width])
    assert torch.equal(one.actions[:, :width], other.actions[:, :width])
    torch.testing.assert_close(one.action_logp[:, :width], other.action_logp[:, :width], **CLOSE)


@torch.no_grad()
def test_the_model_is_no_trivial_case(model: LatentActionLM) -> None:
    """Codes change the token, the policy is far from uniform and from certain: else the tests below would prove
    little."""
    features = model.features(torch.stack(prompts((12,) * 8)))
    world = model.world_logits_of_all(features.read("final").flatten(0, 1)).argmax(-1)  # [M, N]
    assert sum(len(set(row)) for row in world.tolist()) / len(world) > 2
    probabilities = torch.softmax(model.policy_logits(features), -1)
    assert 0.2 < float(probabilities.max(-1).values.mean()) < 0.95


# -- cached equals uncached --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.0}, {"temperature": 1.6, "top_k": 3}], ids=["plain", "greedy", "truncated"]
)
def test_equals_the_plain_loop(model: LatentActionLM, side: str, sampling: dict[str, Any]) -> None:
    rows, limits, streams = prompts((3, 9, 6, 1)), [7, 12, 1, 12], [11, 12, 13, 14]
    ids, mask = padded(rows, side)
    generation = model.generate(ids, mask, max_new_tokens=limits, row_seeds=streams, stop_token=-1, **sampling)
    assert generation.tokens.shape == (4, 12)
    assert generation.lengths.tolist() == limits
    for index, row in enumerate(rows):
        check_row(generation, index, plain_rollout(model, row, limit=limits[index], stream=streams[index], **sampling))


@pytest.mark.parametrize("reads", [("final", "final"), ("late", "final"), ("final", "late")])
def test_equals_the_plain_loop_wherever_the_stacks_read(
    make_model: Callable[..., LatentActionLM], reads: tuple[str, str]
) -> None:
    model = make_model(policy_reads=reads[0], inverse_dynamics_reads=reads[1])
    rows = prompts((5, 2))
    generation = model.generate(*padded(rows, "left"), max_new_tokens=6, row_seeds=[1, 2], stop_token=-1)
    for index, row in enumerate(rows):
        check_row(generation, index, plain_rollout(model, row, limit=6, stream=index + 1))


def test_a_mask_with_a_hole_or_of_booleans_is_the_tokens_it_marks(model: LatentActionLM) -> None:
    ids = torch.stack(prompts((8, 8)))
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1], [1] * 8])
    generation = model.generate(ids, mask.bool(), max_new_tokens=5, row_seeds=[1, 2], stop_token=-1)
    check_row(generation, 0, plain_rollout(model, ids[0][mask[0].bool()], limit=5, stream=1))
    check_row(generation, 1, plain_rollout(model, ids[1], limit=5, stream=2))


def early_end(model: LatentActionLM, rows: list[torch.Tensor], streams: list[int], limit: int) -> int:
    """A token that ends some of the rollouts early, at different places, and leaves others alone."""
    tokens = [
        plain_rollout(model, row, limit=limit, stream=stream)[1] for row, stream in zip(rows, streams, strict=True)
    ]
    for candidate in range(VOCABULARY):
        ends = [row.index(candidate) for row in tokens if candidate in row]
        if 1 < len(ends) < len(rows) and min(ends) > 0 and max(ends) < limit - 3 and len(set(ends)) > 1:
            return candidate
    raise AssertionError("no token ends some rows early: choose other streams")


def test_rows_that_finish_early_are_squeezed_out_and_change_nothing(
    model: LatentActionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, streams = prompts((4, 7, 2, 5, 5, 3)), [21, 22, 23, 24, 25, 26]
    stop = early_end(model, rows, streams, 14)
    squeezed: list[int] = []
    move = SlotMemory.move
    monkeypatch.setattr(
        SlotMemory, "move", lambda self, sources, targets: (squeezed.append(len(sources)), move(self, sources, targets))
    )
    settings: dict[str, Any] = {"max_new_tokens": 14, "row_seeds": streams, "stop_token": stop, "return_features": True}
    generation = model.generate(*padded(rows, "left"), **settings)
    assert squeezed
    for index, row in enumerate(rows):
        expected = plain_rollout(model, row, limit=14, stream=streams[index], stop=stop)
        check_row(generation, index, expected)
        ended = expected[1][-1] == stop
        assert generation.finish_reasons[index] == ("stop" if ended else "length")
        assert int(generation.lengths[index]) == len(expected[1])
    assert set(generation.finish_reasons) == {"stop", "length"}
    # Never squeezing gives the same.
    squeezed.clear()
    monkeypatch.setattr(slot_engine, "SQUEEZE_SHARE", 2.0)
    patient = model.generate(*padded(rows, "left"), **settings)
    assert not squeezed
    same(generation, patient)
    for one, other in zip(generation.features, patient.features, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_decoding_ends_when_all_rows_have_ended(model: LatentActionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    advance = Engine._advance
    monkeypatch.setattr(Engine, "_advance", lambda self, live: (steps.append(len(live)), advance(self, live))[1])
    model.generate(torch.stack(prompts((4, 4))), max_new_tokens=[3, 2], seed=0, stop_token=-1)
    assert steps == [2, 1]  # after the prefill two tokens are fed, then one: the last token of a rollout is never fed


# -- batches, repeats, seeds -------------------------------------------------------------------------------------------


def test_repeats_share_the_prefill_and_equal_separate_rows(
    model: LatentActionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = padded(prompts((6, 3)), "left")
    limits, streams = [5, 9, 2, 9, 4, 9], [31, 32, 33, 34, 35, 36]
    separate = model.generate(
        ids.repeat_interleave(3, 0),
        mask.repeat_interleave(3, 0),
        max_new_tokens=limits,
        row_seeds=streams,
        stop_token=-1,
        return_features=True,
    )
    widths: list[tuple[int, ...]] = []
    prefill = PromptQueue.read_base
    monkeypatch.setattr(
        PromptQueue,
        "read_base",
        lambda self, ids, *more: (widths.append(tuple(ids.shape)), prefill(self, ids, *more))[1],
    )
    shared = model.generate(
        ids, mask, max_new_tokens=limits, row_seeds=streams, stop_token=-1, repeats=3, return_features=True
    )
    assert widths == [(2, 6)]
    same(shared, separate)
    assert len({tuple(row) for row in shared.actions[:3, :2].tolist()}) > 1  # the group's rollouts differ
    for one, other in zip(shared.features, separate.features, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 100])
def test_batch_size_changes_nothing_and_is_kept(
    model: LatentActionLM, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    ids, mask = padded(prompts((6, 3, 8)), "right")
    settings: dict[str, Any] = {"max_new_tokens": [4, 7, 1, 2, 3, 5], "seed": 4, "repeats": 2, "return_features": True}
    whole = model.generate(ids, mask, **settings)
    rows: list[int] = []
    choose = Engine._choose
    monkeypatch.setattr(
        Engine, "_choose", lambda self, slots, *rest: (rows.append(len(slots)), choose(self, slots, *rest))
    )
    chunked = model.generate(ids, mask, batch_size=batch_size, **settings)
    assert max(rows) <= batch_size
    same(whole, chunked)
    assert chunked.tokens.shape == whole.tokens.shape
    for one, other in zip(whole.features, chunked.features, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_rollout_is_the_same_in_any_company(model: LatentActionLM) -> None:
    rows = prompts((5, 9, 2, 7))
    together = model.generate(
        *padded(rows, "left"), max_new_tokens=[8, 3, 10, 6], row_seeds=[41, 42, 43, 44], stop_token=-1
    )
    for order in ([0], [2, 0], [3, 1, 0, 2]):
        ids, mask = padded([rows[index] for index in order], "left")
        part = model.generate(ids, mask, max_new_tokens=10, row_seeds=[41 + index for index in order], stop_token=-1)
        for place, index in enumerate(order):
            length = int(together.lengths[index])
            assert torch.equal(part.tokens[place, :length], together.tokens[index, :length])
            assert torch.equal(part.actions[place, :length], together.actions[index, :length])


def test_row_r_draws_from_the_stream_of_seed_and_r(model: LatentActionLM) -> None:
    ids = torch.stack(prompts((5, 5, 5)))
    by_seed = model.generate(ids, max_new_tokens=6, seed=9, stop_token=-1)
    same(
        by_seed,
        model.generate(ids, max_new_tokens=6, row_seeds=[rollout_seed(9, row) for row in range(3)], stop_token=-1),
    )
    same(by_seed, model.generate(ids, max_new_tokens=6, seed=9, stop_token=-1))
    first_two = model.generate(ids[:2], max_new_tokens=6, seed=9, stop_token=-1)
    assert torch.equal(first_two.tokens, by_seed.tokens[:2])
    assert not torch.equal(by_seed.actions, model.generate(ids, max_new_tokens=6, seed=10, stop_token=-1).actions)


def test_without_a_seed_torchs_global_stream_decides(model: LatentActionLM) -> None:
    ids = torch.stack(prompts((5, 5, 5)))
    with torch.random.fork_rng(devices=[]):
        runs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            runs.append(model.generate(ids, max_new_tokens=6, stop_token=-1))
    same(runs[0], runs[1])
    assert not torch.equal(runs[0].actions, runs[2].actions)


def test_a_seed_leaves_torchs_global_stream_alone(model: LatentActionLM) -> None:
    before = torch.random.get_rng_state()
    model.generate(torch.stack(prompts((5,))), max_new_tokens=3, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())


# -- what the learner recomputes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 4}], ids=["plain", "cool", "truncated"]
)
@torch.no_grad()
def test_stored_log_probabilities_are_those_of_a_full_forward(model: LatentActionLM, sampling: dict[str, Any]) -> None:
    """One right-padded batch of whole rollouts, as the learner has it: policy, world model, truncation all
    recomputed."""
    rows = prompts((6, 3, 8, 4))
    generation = model.generate(*padded(rows, "left"), max_new_tokens=[10, 4, 7, 10], seed=2, stop_token=-1, **sampling)
    whole = [
        torch.cat([row, generation.tokens[i, :n]])
        for i, (row, n) in enumerate(zip(rows, generation.lengths.tolist(), strict=True))
    ]
    ids, mask = padded(whole, "right")
    features = model.features(ids, mask)
    logits = model.policy_logits(features, mask)
    for index, row in enumerate(rows):
        length = int(generation.lengths[index])
        positions = slice(len(row) - 1, len(row) + length - 1)
        actions = generation.actions[index, :length]
        log_probs = action_log_probs(logits[index, positions], keep=actions, **sampling)
        torch.testing.assert_close(
            log_probs.gather(-1, actions[:, None])[:, 0], generation.action_logp[index, :length], **CLOSE
        )
        codes = torch.zeros(len(ids), ids.shape[1], dtype=torch.long)
        codes[index, positions] = actions
        assert (
            model.world_logits(features, codes)[index, positions].argmax(-1).tolist()
            == generation.tokens[index, :length].tolist()
        )
        if "top_k" in sampling:
            best = logits[index, positions].topk(sampling["top_k"]).indices
            assert bool((best == actions[:, None]).any(-1).all())


@pytest.mark.parametrize("level", ["latent", "base"])
@torch.no_grad()
def test_returned_features_are_those_of_a_full_forward(model: LatentActionLM, level: str) -> None:
    rows = prompts((6, 3, 8))
    limits = [5, 9, 1]
    generation = model.generate(
        *padded(rows, "left"), max_new_tokens=limits, seed=2, level=level, stop_token=-1, return_features=True
    )
    reads = "late" if level == "latent" else "final"
    for index, row in enumerate(rows):
        whole = torch.cat([row, generation.tokens[index, : limits[index]]])[None, :-1]
        wanted = model.features(whole).read(reads)[0][
            0 if level == "latent" else len(row) - 1 :
        ]  # the bare LM reads one position at a time
        assert generation.features[index].shape == wanted.shape
        torch.testing.assert_close(generation.features[index], wanted, **CLOSE)


def test_features_only_when_asked_for(model: LatentActionLM) -> None:
    assert model.generate(torch.stack(prompts((4,))), max_new_tokens=2, seed=0).features is None


@torch.no_grad()
def test_learned_log_probabilities_from_features_alone(model: LatentActionLM) -> None:
    """The learner's cheap way: the policy's blocks on the cached features, without mask, right padded."""
    rows = prompts((6, 3))
    generation = model.generate(
        *padded(rows, "left"), max_new_tokens=[5, 9], seed=2, stop_token=-1, return_features=True
    )
    states = torch.nn.utils.rnn.pad_sequence(list(generation.features), batch_first=True)
    log_probs = action_log_probs(model.policy(states))
    for index, row in enumerate(rows):
        length = int(generation.lengths[index])
        own = log_probs[index, len(row) - 1 : len(row) + length - 1]
        recomputed = own.gather(-1, generation.actions[index, :length, None])[:, 0]
        torch.testing.assert_close(recomputed, generation.action_logp[index, :length], **CLOSE)


# -- what is sampled ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5, "top_k": 3}], ids=["plain", "truncated"])
@torch.no_grad()
def test_first_codes_have_the_policys_frequencies(model: LatentActionLM, sampling: dict[str, Any]) -> None:
    prompt, count = torch.stack(prompts((6,))), 4000
    expected = action_log_probs(model.policy_logits(model.features(prompt))[0, -1], **sampling).exp()
    actions = model.generate(prompt, max_new_tokens=1, seed=3, repeats=count, **sampling).actions[:, 0]
    drawn = torch.bincount(actions, minlength=8) / count
    assert bool(((drawn - expected).abs() <= 5 * (expected / count).sqrt() + 1e-6).all()), (drawn, expected)


def test_greedy_needs_no_seed_and_top_1_is_greedy(model: LatentActionLM) -> None:
    ids = torch.stack(prompts((6, 6)))
    greedy = model.generate(ids, max_new_tokens=8, temperature=0.0, seed=1)
    same(greedy, model.generate(ids, max_new_tokens=8, temperature=0.0, seed=2))
    top_1 = model.generate(ids, max_new_tokens=8, top_k=1, seed=3)
    assert torch.equal(top_1.tokens, greedy.tokens)
    assert float(top_1.action_logp.abs().max()) < 1e-6  # certain


# -- the other levels --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_base_level_greedy_is_transformers_own_generate(model: LatentActionLM) -> None:
    ids, mask = padded(prompts((6, 3, 8)), "left")
    ours = model.generate(ids, mask, max_new_tokens=10, temperature=0.0, level="base")
    theirs = model.base.lm.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=PAD)
    assert torch.equal(ours.tokens[:, : theirs.shape[1] - 8], theirs[:, 8:])
    assert torch.equal(ours.actions.masked_fill(ours.actions == -1, PAD), ours.tokens)


@pytest.mark.parametrize("trains", ["last_blocks", "steering", "added_blocks", "mlp", "all"])
def test_token_level_at_its_start_is_base_level(make_base: Callable[..., PreTrainedModel], trains: Trains) -> None:
    ids, mask = padded(prompts((6, 3, 8)), "left")
    plain = BaseLM(make_base())
    expected = generate(plain, base_actor(plain), SamplingParams(max_new_tokens=9, seed=5), ids, mask)
    base, policy = token_policy(make_base(), trains, 2)
    if base.late_blocks:
        base.drop_late_blocks()
    got = generate(
        base, token_actor(base, policy), SamplingParams(max_new_tokens=9, seed=5, return_features=True), ids, mask
    )
    same(got, expected)
    lengths = got.lengths if trains in ("all", "mlp") else mask.sum(1) + got.lengths - 1
    assert [len(states) for states in got.features] == lengths.tolist()


# -- end tokens --------------------------------------------------------------------------------------------------------


def test_the_end_token_counts_and_is_the_last(make_model: Callable[..., LatentActionLM]) -> None:
    """By default the base's own end tokens end a rollout; chat models have several."""
    model = make_model()
    rows, streams = prompts((4, 7, 2, 5)), [51, 52, 53, 54]
    free = model.generate(*padded(rows, "left"), max_new_tokens=10, row_seeds=streams, stop_token=-1)
    assert free.finish_reasons == ("length",) * 4
    ends = sorted({int(free.tokens[0, 4]), int(free.tokens[1, 2])})
    model.base.lm.generation_config.eos_token_id = ends
    ended = model.generate(*padded(rows, "left"), max_new_tokens=10, row_seeds=streams)
    for index in range(4):
        free_row = free.tokens[index].tolist()
        hits = [place for place, token in enumerate(free_row) if token in ends]
        length = hits[0] + 1 if hits else 10
        assert int(ended.lengths[index]) == length
        assert ended.tokens[index].tolist() == free_row[:length] + [PAD] * (10 - length)
        assert ended.finish_reasons[index] == ("stop" if hits else "length")
    assert ended.finish_reasons[:2] == ("stop", "stop")


def test_an_end_token_at_the_limit_is_a_stop(model: LatentActionLM) -> None:
    ids = torch.stack(prompts((5,)))
    third = int(model.generate(ids, max_new_tokens=3, row_seeds=[1], stop_token=-1).tokens[0, 2])
    assert model.generate(ids, max_new_tokens=3, row_seeds=[1], stop_token=third).finish_reasons == ("stop",)


def test_special_tokens_of_a_base(base: PreTrainedModel) -> None:
    assert special_tokens(base, None) == ((END,), PAD)
    assert special_tokens(base, -1) == ((), PAD)
    assert special_tokens(base, 9) == ((9,), PAD)
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = None, None
    assert special_tokens(base, None) == ((), 0)


# -- codes chosen by the caller ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": [3, 4, 5]}, r"max_new_tokens=\[3, 4, 5\].*2 rows"),
        ({"max_new_tokens": [3, 0]}, r"max_new_tokens=\[3, 0\]"),
        ({"temperature": -0.1}, r"temperature=-0\.1"),
        ({"top_k": 0}, "top_k=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"level": "token"}, "level='token'"),
        ({"row_seeds": [1]}, "1 row_seeds.*2 rows"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}, "all zero"),
    ],
)
def test_bad_arguments_are_named(model: LatentActionLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(torch.stack(prompts((4, 4))), **{"max_new_tokens": 3} | arguments)


def test_left_pad_moves_and_cuts_padding() -> None:
    ids = torch.tensor([[5, 6, 0, 0, 0], [0, 7, 8, 9, 0]])
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
    moved, moved_mask = left_pad(ids, mask, 3)
    assert moved.tolist() == [[3, 5, 6], [7, 8, 9]]
    assert moved_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
