"""Tree search: cached chunks equal a full pass, the tree's numbers by hand, the best of an enumerable toy, budgets,
determinism."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from latent_control.distributions import action_log_probs  # noqa: E402
from latent_control.model import latent_actor  # noqa: E402
from latent_control.search import ChunkDecoder, SearchSettings, Segment, Tree, best_of_tokens, play_once, search  # noqa: E402
from latent_control.search.decoder import Job  # noqa: E402
from latent_control.search.mcts import cache_bytes_bound  # noqa: E402
from latent_control.search.q_head import QHead, QShape  # noqa: E402
from latent_control.search.segments import SearchResponse, learned_value  # noqa: E402

PROMPTS = [(5, 9, 11), (7, 3, 8, 21, 30, 4)]


def decoder_of(model: Any, **settings: Any) -> ChunkDecoder:
    return ChunkDecoder(model.base, latent_actor(model), **{"stop_tokens": (2,)} | settings)


def q_head(model: Any, seed: int = 5) -> QHead:
    head = QHead(
        QShape(
            width=32,
            hidden=0,
            num_actions=8,
            span=model.config.span,
            reads="late",
            late_blocks=2,
            support=1e-9,
            world_hash="",
            base_hash="",
        )
    )
    torch.nn.init.normal_(head.out.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return head.requires_grad_(False)


def digest(_: int, response: SearchResponse) -> float:
    """A value in [0, 1] that looks random but depends on the tokens alone."""
    return math.modf(sum((i + 1) * 0.7310585 * (token + 1) for i, token in enumerate(response.tokens)))[0]


def check_against_full_pass(model: Any, prompt: tuple[int, ...], chunks: list[Segment], temperature: float) -> None:
    """Tokens and log-probabilities of a path, recomputed without a cache from its codes."""
    tokens = [t for chunk in chunks for t in chunk.tokens]
    actions = torch.tensor([[a for chunk in chunks for a in chunk.actions]])
    ids = torch.tensor([[*prompt, *tokens]])
    features = model.features(ids)
    at = slice(len(prompt) - 1, ids.shape[1] - 1)
    full = torch.zeros_like(ids)
    full[:, at] = actions
    assert model.world_logits(features, full)[0, at].argmax(-1).tolist() == tokens
    logp = action_log_probs(model.policy_logits(features)[0, at], temperature=temperature).gather(
        -1, actions[0, :, None]
    )[:, 0]
    found = torch.tensor([p for chunk in chunks for p in chunk.action_logp])
    starts = torch.arange(len(tokens)) % model.config.span == 0
    torch.testing.assert_close(found, torch.where(starts, logp, 0.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changed", [{}, {"span": 2}, {"policy_reads": "final", "inverse_dynamics_reads": "final"}])
@torch.no_grad()
def test_cached_chunks_equal_a_full_pass(make_model, changed):
    model = make_model(**changed)
    decoder = decoder_of(model, stop_tokens=())
    first = decoder.extend([Job(path=[root], seeds=[1, 2], room=20) for root in decoder.prefill(PROMPTS)], 2)
    roots = decoder.prefill(PROMPTS)
    # The second call mixes a node of depth 1 with a root of another prompt: different widths in one batch.
    jobs = [Job(path=[roots[0], first[0][1]], seeds=[3, 4], room=18), Job(path=[roots[1]], seeds=[5], room=20)]
    second = decoder.extend(jobs, 4)
    rest = decoder.extend([Job(path=[roots[0], first[0][1], second[0][0]], seeds=[6], room=5)], 20, keep=False)
    assert [len(s.tokens) for s in (first[0][1], second[0][0], rest[0][0])] == [2, 4, 5]
    check_against_full_pass(model, PROMPTS[0], [first[0][1], second[0][0], rest[0][0]], 1.0)
    check_against_full_pass(model, PROMPTS[0], [first[0][1], second[0][1]], 1.0)
    check_against_full_pass(model, PROMPTS[1], [second[1][0]], 1.0)
    assert decoder.generated == 4 * 2 + 3 * 4 + 5


def test_greedy_equals_generate(model):
    decoder = decoder_of(model)
    for prompt, one in zip(
        PROMPTS, play_once(decoder, PROMPTS, max_new_tokens=9, seeds=[0, 1], greedy=True), strict=True
    ):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=9, temperature=0)
        assert list(one.response.tokens) == expected.tokens[0, : expected.lengths[0]].tolist()
        assert one.tokens == len(one.response.tokens) == int(expected.lengths[0])


def test_a_chunk_may_not_end_inside_a_code(make_model):
    model = make_model(span=2)
    decoder = decoder_of(model)
    with pytest.raises(ValueError, match="chunks of 3 tokens"):
        decoder.extend([Job(path=decoder.prefill(PROMPTS[:1]), seeds=[1], room=9)], 3)


def leaf(*tokens: int, finished: bool = False) -> Segment:
    return Segment(tokens=tokens, actions=tokens, action_logp=(0.0,) * len(tokens), finished=finished, stopped=finished)


def test_selection_and_backup_by_hand():
    tree = Tree(leaf(9), width=2, c=0.5, seed=0)
    assert tree.select() is tree.root
    assert len(set(tree.seeds(tree.root))) == 2
    a, b = tree.grow(tree.root, [leaf(1), leaf(2)])
    tree.backup(tree.root, [a, b], [1.0, 0.25])
    assert (tree.root.visits, tree.root.total, tree.root.pending) == (2, 1.25, 0)
    # a: 1 + 0.5 sqrt(ln 2 / 1) beats b: 0.25 + the same
    assert a.score(0.5) == pytest.approx(1 + 0.5 * math.sqrt(math.log(2)))
    assert tree.select() is a
    tree.seeds(a)
    tree.backup(a, tree.grow(a, [leaf(3), leaf(3)]), [0.0])  # equal chunks are one child
    assert (a.visits, a.total, a.mean, tree.root.visits) == (2, 1.0, 0.5, 3)
    # a: 0.5 + 0.5 sqrt(ln 3 / 2) = 0.871, b: 0.25 + 0.5 sqrt(ln 3) = 0.774
    assert a.score(0.5) == pytest.approx(0.5 + 0.5 * math.sqrt(math.log(3) / 2))
    assert b.score(0.5) == pytest.approx(0.25 + 0.5 * math.sqrt(math.log(3)))
    # With c = 2 b's turn comes: 0.25 + 2 * 1.048 = 2.346 against 0.5 + 2 * 0.741 = 1.982
    tree.c = 2.0
    assert tree.select() is b


def test_finished_children_are_not_walked_into():
    tree = Tree(leaf(9), width=2, c=0.5, seed=0)
    tree.seeds(tree.select())
    done, opened = tree.grow(tree.root, [leaf(1, 2, finished=True), leaf(3)])
    tree.backup(tree.root, [done, opened], [1.0, 0.0])
    assert tree.select() is opened


@torch.no_grad()
def test_search_finds_the_best_of_an_enumerable_toy(model):
    prompt, judged = PROMPTS[0], {}
    for codes in itertools.product(range(8), repeat=2):
        ids = torch.tensor([prompt])
        for code in codes:
            logits = model.world_logits(model.features(ids), torch.full_like(ids, code))[:, -1]
            ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
            if ids[0, -1] == 2:
                break
        tokens = tuple(ids[0, len(prompt) :].tolist())
        judged[tokens] = digest(0, SearchResponse(tokens=tokens, actions=(), stopped=False, last_q=None))
    assert len(judged) > 8
    settings = SearchSettings(iterations=80, chunk=1, width=8, c=10.0, max_new_tokens=2)  # explores nearly evenly
    (found,) = search(decoder_of(model, temperature=6.0), [prompt], digest, settings, seeds=[4])
    assert found.response.tokens == max(judged, key=lambda tokens: judged[tokens])
    assert found.value == max(judged.values())


def test_budgets_are_counted_by_hand(model):
    """Without an end token each iteration costs width x chunk, and each new child a rollout of what room is left."""
    decoder = decoder_of(model, stop_tokens=())
    settings = SearchSettings(iterations=1, chunk=2, width=3, max_new_tokens=6)
    (found,) = search(decoder, PROMPTS[:1], digest, settings, seeds=[0])
    children = found.nodes - 1
    assert found.tokens == decoder.generated == 3 * 2 + children * 4
    assert found.responses == children
    best = best_of_tokens(decoder, PROMPTS[:1], digest, budgets=[found.tokens], max_new_tokens=6, seeds=[0])[0]
    assert best.responses == math.ceil(found.tokens / 6)
    assert best.tokens == 6 * best.responses  # the response that reaches the budget is finished
    assert 0 < found.cache_bytes <= cache_bytes_bound(decoder.prefill(PROMPTS[:1])[0], settings)


def test_memory_is_shared_with_the_prefix(model):
    """A node stores its own tokens' keys and values only: blocks x 2 x key-value heads x head size x 4 bytes each."""
    decoder = decoder_of(model, stop_tokens=())
    root = decoder.prefill(PROMPTS[:1])[0]
    per_token = (4 + 2) * 2 * 2 * 8 * 4  # 4 blocks of the base and 2 of the policy
    assert root.bytes == 3 * per_token
    assert decoder.extend([Job(path=[root], seeds=[1], room=9)], 2)[0][0].bytes == 2 * per_token


@pytest.mark.parametrize("guided", [False, True])
def test_a_search_is_a_function_of_its_seed_and_not_of_its_neighbours(model, guided):
    settings = SearchSettings(iterations=6, chunk=2, width=2, max_new_tokens=8, guided=guided, q_temperature=5.0)
    decoder = decoder_of(model, q=q_head(model))
    both = search(decoder, PROMPTS, digest, settings, seeds=[3, 4])
    alone = search(decoder, PROMPTS[1:], lambda _, response: digest(1, response), settings, seeds=[4])
    assert both == search(decoder, PROMPTS, digest, settings, seeds=[3, 4])
    # another batch: sums may round otherwise, so Q agrees to a millionth only
    a, b = both[1].response, alone[0].response
    assert (a.tokens, a.actions, both[1].value, both[1].tokens) == (
        b.tokens,
        b.actions,
        alone[0].value,
        alone[0].tokens,
    )
    assert a.last_q == pytest.approx(b.last_q, abs=1e-4)
    others = [search(decoder, PROMPTS[1:], digest, settings, seeds=[seed])[0].response.tokens for seed in range(5, 11)]
    assert len({a.tokens, *others}) > 1


def test_the_best_value_wins_and_visits_break_ties(model):
    settings = SearchSettings(iterations=12, chunk=2, width=2, max_new_tokens=6)
    values = []

    def remember(number: int, response: SearchResponse) -> float:
        values.append(digest(number, response))
        return values[-1]

    (found,) = search(decoder_of(model), PROMPTS[:1], remember, settings, seeds=[1])
    assert found.value == max(values)
    assert found.responses == len(values)


def test_q_leads_the_choice_of_codes(model):
    """pi(a) exp(Q(a) / t), normalised, by hand; a very small t takes the argmax of Q."""
    decoder = decoder_of(model, q=q_head(model))
    root = decoder.prefill(PROMPTS[:1])[0]
    q = decoder.q(root.state[None])
    by_hand = torch.softmax(root.logits, -1) * torch.exp(q[0] / 0.5)
    led = decoder.log_probs(root.logits[None], root.state[None], 0.5)[0].exp()
    torch.testing.assert_close(led, by_hand / by_hand.sum())
    assert decoder.value(root) == pytest.approx(float(q.max().clamp(0, 1)))
    chunk = decoder.extend([Job(path=[root], seeds=[1], room=9)], 1, q_temperature=1e-3)[0][0]
    assert chunk.actions == (int(q.argmax()),)
    assert chunk.last_q == pytest.approx(float(q.max()), abs=1e-5)
    assert learned_value(0, SearchResponse(tokens=(1,), actions=(1,), stopped=True, last_q=1.7)) == 1.0


def test_a_guided_search_generates_no_rollouts(model):
    decoder = decoder_of(model, q=q_head(model), stop_tokens=())
    settings = SearchSettings(iterations=3, chunk=2, width=2, max_new_tokens=40, guided=True)
    (found,) = search(decoder, PROMPTS[:1], digest, settings, seeds=[0])
    # 3 iterations x 2 chunks of 2 tokens; nothing has ended, so the best leaf is played to its end: at most 40 tokens
    # less its depth
    assert 3 * 2 * 2 + 40 - 6 <= found.tokens <= 3 * 2 * 2 + 40 - 2
    assert found.responses == 1
    with pytest.raises(ValueError, match="train-q"):
        search(decoder_of(model), PROMPTS[:1], digest, settings, seeds=[0])


def test_settings_that_cannot_work_are_named():
    with pytest.raises(ValueError, match="iterations=0"):
        SearchSettings(iterations=0)
