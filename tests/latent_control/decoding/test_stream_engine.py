"""The server's engine: rows that come and go, each with its own settings, are what ``Engine`` decodes for them alone;
log-probabilities are those of a teacher-forced pass of plain transformers over the mixture."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from latent_control import LatentActionLM
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.stream_engine import StreamEngine
from latent_control.decoding.stream_rows import NewToken, RowParams
from latent_control.decoding.token_choice import TokenChoice
from latent_control.decoding.token_scores import prompt_scores
from latent_control.model import latent_actor

END = 2
PROMPT = (5, 9, 11, 7, 30)


def engine_of(model: LatentActionLM, slots: int = 4, **settings: Any) -> StreamEngine:
    return StreamEngine(model.base, latent_actor(model), slots=slots, ends=[END], **settings)


def asked(**changes: Any) -> RowParams:
    return RowParams(**{"prompt": PROMPT, "max_tokens": 8, "temperature": 0.0, "seed": 3} | changes)


def played(engine: StreamEngine, rows: list[RowParams]) -> list[list[NewToken]]:
    """What each row became; all enter as slots are free."""
    numbers = [engine.add(row) for row in rows]
    told: dict[int, list[NewToken]] = {number: [] for number in numbers}
    while engine.rows:
        for new in engine.step():
            told[new.row].append(new)
    return [told[number] for number in numbers]


def alone(model: LatentActionLM, row: RowParams) -> tuple[list[int], list[int], list[float], str]:
    """Tokens, codes, log-probabilities and the reason of the end, by ``Engine``."""
    out = model.generate(
        torch.tensor([row.prompt]),
        max_new_tokens=row.max_tokens,
        temperature=row.temperature,
        top_k=row.top_k,
        row_seeds=[row.seed],
        decode=row.decode,
        codes=None if row.codes is None else [list(row.codes)],
        allowed_codes=None if row.allowed is None else [list(row.allowed)],
        stop_token=END,
    )
    length = int(out.lengths[0])
    tokens, codes = (column[0, :length].tolist() for column in (out.tokens, out.actions))
    return tokens, codes, out.action_logp[0, :length].tolist(), out.finish_reasons[0]


def some_rows(seed: int, count: int, codes: int, span: int) -> Iterator[RowParams]:
    rng = random.Random(seed)
    for _ in range(count):
        decode = rng.choice(["code", "token"])
        forced = [rng.choice([None, rng.randrange(codes)]) for _ in range(rng.randint(1, 3))]
        yield RowParams(
            prompt=tuple(rng.randrange(3, 48) for _ in range(rng.randint(1, 9))),
            max_tokens=rng.randint(1, 14),
            temperature=rng.choice([0.0, 0.7, 1.0, 2.0]),
            seed=rng.randrange(2**40),
            top_k=rng.choice([None, 1, 3]) if decode == "code" else None,
            decode=decode,  # type: ignore[arg-type]
            codes=rng.choice([None, tuple(code for code in forced for _ in range(span))]),
            allowed=rng.choice([None, tuple(range(codes)), None]),
        )


@pytest.mark.parametrize("shape", [{}, {"span": 3}, {"policy_kind": "mlp"}])
@pytest.mark.parametrize("cached", [False, True])
def test_rows_that_come_and_go_are_what_they_are_alone(
    make_model: Callable[..., LatentActionLM], shape: dict[str, Any], cached: bool
) -> None:
    model = make_model(num_actions=8, **shape)
    engine = engine_of(model, slots=5, tree=PrefixTree(16) if cached else None)
    rows, rng = list(some_rows(1, 40, 8, shape.get("span", 1))), random.Random(2)
    rows[20:25] = rows[:5]  # their prompts are known by then
    told: dict[int, list[NewToken]] = {}
    expected: dict[int, RowParams] = {}
    for row in rows:
        number = engine.add(row)
        told[number], expected[number] = [], row
        if rng.random() < 0.2:  # a neighbour that hangs up at once, or after some tokens
            gone = engine.add(asked(temperature=1.0, seed=9))
            told[gone] = []
            for _ in range(rng.randrange(3)):
                for new in engine.step():
                    told[new.row].append(new)
            engine.remove(gone)
            assert gone not in engine.rows and gone not in engine.rows_in
        for _ in range(rng.randrange(4)):
            for new in engine.step():
                told[new.row].append(new)
    while engine.rows:
        for new in engine.step():
            told[new.row].append(new)
    for number, row in expected.items():
        tokens, codes, logp, reason = alone(model, row)
        news = told[number]
        assert ([new.token for new in news], [new.code for new in news]) == (tokens, codes), row
        assert [new.code_logp for new in news] == pytest.approx(logp, abs=1e-4)
        assert [new.finish for new in news] == [None] * (len(news) - 1) + [reason]
    assert not engine.prompts.prompts and not engine.prompts.entries


def test_a_row_that_leaves_frees_its_slot_at_the_next_step(make_model: Callable[..., LatentActionLM]) -> None:
    engine = engine_of(make_model(), slots=2)
    rows = [engine.add(asked(max_tokens=30, codes=(code,) * 30)) for code in (1, 2, 3)]
    assert {new.row for new in engine.step()} == set(rows[:2]) and engine.waiting == 1
    engine.remove(rows[0])
    assert {new.row for new in engine.step()} == set(rows[1:]) and engine.waiting == 0


def test_slots_have_memory_when_rows_need_it(make_model: Callable[..., LatentActionLM]) -> None:
    model = make_model()
    engine = engine_of(model, slots=100)
    rows = [asked(prompt=(3 + number % 40, 7), temperature=1.0, seed=number) for number in range(20)]
    one, *_ = played(engine, rows[:1])
    assert engine.memory.buffers[0].data.shape[0] == 16
    news = played(engine, rows)
    assert engine.memory.buffers[0].data.shape[0] == 32
    assert [[new.token for new in row] for row in news] == [alone(model, row)[0] for row in rows]
    assert [new.token for new in one] == [new.token for new in news[0]]


# -- log-probabilities -------------------------------------------------------------------------------------------------


def mixture(model: LatentActionLM, ids: list[int], pi: torch.Tensor | None = None) -> torch.Tensor:
    """log sum_a pi(a) p(x | a) of what follows ``ids``, [V], written out: one pass of transformers' own model, the
    policy's own stack, and a code at a time."""
    given = torch.tensor([ids])
    final = model.base.lm.model(input_ids=given, use_cache=False).last_hidden_state
    features = model.features(given)
    torch.testing.assert_close(features.read("final"), final, atol=1e-4, rtol=0)
    if pi is None:
        pi = model.policy(features.read(model.config.policy_state), None)[0, -1].softmax(-1)
    total = torch.zeros(model.base.lm.config.vocab_size)
    for code in range(model.config.num_actions):
        merged = model.merge(final[0, -1], model.codebook[code])
        total += pi[code] * model.base.lm.lm_head(merged).softmax(-1)
    return total.log()


@pytest.mark.parametrize("decode", ["code", "token"])
@torch.no_grad()
def test_scores_are_those_of_the_mixture(make_model: Callable[..., LatentActionLM], decode: Any) -> None:
    model = make_model(num_actions=20)
    rows = [asked(temperature=1.0, decode=decode, top_scores=3), asked(prompt=(4, 8), temperature=0.5, decode=decode)]
    scored, plain = played(engine_of(model), rows)
    assert all(new.score is None for new in plain)
    ids = list(PROMPT)
    for new in scored:
        wanted = mixture(model, ids)
        assert new.score is not None
        assert new.score.logp == pytest.approx(float(wanted[new.token]), abs=1e-4)
        values, tokens = wanted.topk(3)
        assert [token for token, _ in new.score.top] == tokens.tolist()
        assert [logp for _, logp in new.score.top] == pytest.approx(values.tolist(), abs=1e-4)
        ids.append(new.token)


@torch.no_grad()
def test_scores_of_a_prompt(make_model: Callable[..., LatentActionLM]) -> None:
    model = make_model(num_actions=20)
    found = [score for part in prompt_scores(model.base, latent_actor(model), PROMPT, most=2) for score in part]
    assert len(found) == len(PROMPT) - 1
    for place, score in enumerate(found, 1):
        wanted = mixture(model, list(PROMPT[:place]))
        assert score.logp == pytest.approx(float(wanted[PROMPT[place]]), abs=1e-4)
        assert [token for token, _ in score.top] == wanted.topk(2).indices.tolist()


@torch.no_grad()
def test_scores_inside_a_span_follow_from_its_tokens(make_model: Callable[..., LatentActionLM]) -> None:
    """Where a code lasts for two tokens: p(x_2 | x_1) = sum_a p(a | x_1) p(x_2 | a), by Bayes' rule written out."""
    model = make_model(num_actions=20, span=2)
    given = torch.tensor([PROMPT])
    final, pi = model.features(given).read("final")[0], model.policy_logits(model.features(given))[0].softmax(-1)

    def world(place: int) -> torch.Tensor:  # [N, V]
        return torch.stack([model.base.lm.lm_head(model.merge(final[place], c)) for c in model.codebook]).softmax(-1)

    belief = pi[0] * world(0)[:, PROMPT[1]]
    wanted = [belief.sum().log(), ((belief / belief.sum()) @ world(1))[PROMPT[2]].log()]
    found = [score for part in prompt_scores(model.base, latent_actor(model), PROMPT, most=1) for score in part]
    assert [score.logp for score in found[:2]] == pytest.approx([float(x) for x in wanted], abs=1e-4)
    assert found[2].logp == pytest.approx(float((pi[2] @ world(2))[PROMPT[3]].log()), abs=1e-4)


# -- choice of tokens --------------------------------------------------------------------------------------------------


def test_choices_by_hand() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logs = probabilities.log()
    shifted = TokenChoice(presence_penalty=1.0, frequency_penalty=0.5, bias=((3, 2.0),)).shifted(logs, Counter({0: 2}))
    assert (shifted - logs).tolist() == pytest.approx([-2.0, 0.0, 0.0, 2.0])

    def kept(**settings: float) -> list[float]:
        return [round(float(p), 4) for p in TokenChoice(**settings).cut(logs).exp()]

    assert kept(top_p=0.7) == [0.6667, 0.3333, 0.0, 0.0]
    assert kept(top_p=0.75) == [0.6667, 0.3333, 0.0, 0.0], "0.5 + 0.25 reach it"
    assert kept(top_p=0.01) == [1.0, 0.0, 0.0, 0.0], "the likeliest stays"
    assert kept(min_p=0.29) == [0.5556, 0.2778, 0.1667, 0.0], "0.145 is the least"
    assert kept(min_p=0.29, top_p=0.6) == [0.6667, 0.3333, 0.0, 0.0]


def test_sampled_tokens_follow_the_changed_mixture(make_model: Callable[..., LatentActionLM]) -> None:
    model = make_model(num_actions=8)
    choice = TokenChoice(top_p=0.8, bias=((7, 1.5),))
    rows = [asked(max_tokens=1, temperature=0.7, seed=seed, decode="token", choice=choice) for seed in range(2000)]
    engine = engine_of(model, slots=500, mixture_codes=None)
    found = torch.bincount(torch.tensor([row[0].token for row in played(engine, rows)]), minlength=48) / len(rows)
    with torch.no_grad():
        logits = mixture(model, list(PROMPT))
    logits[7] += 1.5
    p = (logits / 0.7).softmax(-1)
    order = sorted(range(48), key=lambda token: -float(p[token]))
    kept = [token for place, token in enumerate(order) if float(p[order[:place]].sum()) < 0.8]
    wanted = torch.zeros(48).index_copy(0, torch.tensor(kept), p[kept] / p[kept].sum())
    assert found[wanted == 0].sum() == 0
    assert 0.5 * float((found - wanted).abs().sum()) < 0.06


def test_penalties_count_generated_tokens(make_model: Callable[..., LatentActionLM]) -> None:
    model = make_model(num_actions=8)
    (free,), (kept,) = (
        played(engine_of(model), [asked(max_tokens=24, decode="token", choice=choice)])
        for choice in (TokenChoice(), TokenChoice(presence_penalty=2.0, frequency_penalty=2.0))
    )
    most = [max(Counter(new.token for new in news).values()) for news in (free, kept)]
    assert most[1] < most[0]
    (banned,) = played(engine_of(model), [asked(decode="token", choice=TokenChoice(bias=((free[0].token, -100.0),)))])
    assert free[0].token not in [new.token for new in banned]


# -- grammars ----------------------------------------------------------------------------------------------------------


class Even:
    """Only even tokens, and nothing after 6."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self) -> torch.Tensor:
        return torch.arange(48) % 2 == 0

    def take(self, token: int) -> bool:
        self.taken.append(token)
        return token == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.no_grad()
def test_the_policy_chooses_among_the_codes_that_a_grammar_leaves(
    make_model: Callable[..., LatentActionLM], temperature: float
) -> None:
    model = make_model(num_actions=20)
    grammar = Even()
    row = asked(temperature=temperature, max_tokens=12, grammar=grammar)
    neighbour = asked(prompt=(4, 8), temperature=1.0)
    news, beside = played(engine_of(model), [row, neighbour])
    assert [new.token for new in beside] == alone(model, neighbour)[0]
    ids, seen = list(PROMPT), set()
    for new in news:
        features = model.features(torch.tensor([ids]))
        world = model.world_logits_of_all(features.read("final")[0, -1:])[0]
        logits = model.policy_logits(features)[0, -1]
        fits = world.argmax(-1) % 2 == 0
        left = fits if bool(fits.any()) else torch.ones(20, dtype=torch.bool)
        assert new.codes_left == int(left.sum()) and bool(left[new.code])
        log_probs = logits.masked_fill(~left, float("-inf")).log_softmax(-1)
        assert new.code_logp == pytest.approx(float(log_probs[new.code]), abs=1e-4)
        assert temperature or new.code == int(log_probs.argmax())
        even = world[new.code].clone()
        even[1::2] = float("-inf")
        assert new.token == int(even.argmax())
        seen.add(bool(fits.any()))
        ids.append(new.token)
    assert True in seen
    assert grammar.taken == ids[len(PROMPT) :]
    assert news[-1].finish == ("stop" if ids[-1] in (6, END) else "length")


def test_by_token_a_grammar_binds_the_mixture(make_model: Callable[..., LatentActionLM]) -> None:
    model = make_model(num_actions=8)
    rows = [asked(max_tokens=1, temperature=1.0, seed=s, decode="token", grammar=Even()) for s in range(1500)]
    engine = engine_of(model, slots=500, mixture_codes=None)
    found = torch.bincount(torch.tensor([row[0].token for row in played(engine, rows)]), minlength=48) / len(rows)
    with torch.no_grad():
        wanted = mixture(model, list(PROMPT)).exp()
    wanted[1::2] = 0
    wanted /= wanted.sum()
    assert found[1::2].sum() == 0 and 0.5 * float((found - wanted).abs().sum()) < 0.06
