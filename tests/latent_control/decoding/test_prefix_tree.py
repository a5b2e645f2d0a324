"""Prefixes shared over calls: the same rollouts as without, each token read once, memory bounded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from latent_control import Generation, LatentActionLM
from latent_control.decoding import prefill
from latent_control.decoding.generate import generate
from latent_control.decoding.prefix_tree import PrefixNode, PrefixTree, shared_beginnings
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.text import left_padded

Rows = Sequence[Sequence[int]]
KINDS: dict[str, dict[str, Any]] = {
    "blocks": {},
    "blocks on final": {"policy_reads": "final", "inverse_dynamics_reads": "final"},
    "mlp": {"policy_kind": "mlp", "policy_width": 24},
    "mlp on both": {"policy_kind": "mlp", "policy_reads": "both"},
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, make_model: Callable[..., LatentActionLM]) -> LatentActionLM:
    return make_model(**KINDS[request.param])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beginnings of two tokens are worth sharing."""
    monkeypatch.setattr(prefill, "SHARED_TOKENS", 2)


def decode(model: LatentActionLM, rows: Rows, tree: PrefixTree | None, seed: int, **changes: Any) -> Generation:
    static = changes.pop("static", False)
    settings: dict[str, Any] = {"max_new_tokens": 5, "seed": seed, "repeats": 2, "return_features": True}
    with torch.no_grad():
        return generate(
            model.base,
            model.actor(),
            SamplingParams(**settings | changes),
            *left_padded(rows, torch.device("cpu")),
            tree=tree,
            static=static,
        )


def assert_same(one: Generation, other: Generation) -> None:
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.actions, other.actions)
    torch.testing.assert_close(one.action_logp, other.action_logp, rtol=0, atol=1e-4)
    for mine, theirs in zip(one.features or (), other.features or (), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def prompts(dice: random.Random, count: int) -> list[list[int]]:
    """Random prompts that often begin alike."""
    stems = [[dice.randrange(3, 48) for _ in range(dice.randrange(1, 9))] for _ in range(3)]
    return [dice.choice(stems) + [dice.randrange(3, 7) for _ in range(dice.randrange(1, 6))] for _ in range(count)]


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("room", [64.0, 0.02, 0.0])
def test_rollouts_are_the_same_with_and_without(
    model: LatentActionLM, lean: bool, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight calls on random prompts, with much room, with evictions all the time, with none."""
    if not lean:
        monkeypatch.setattr(prefill, "lean_blocks", lambda decoder: None)
    dice, tree = random.Random(room), PrefixTree(room)
    for call in range(8):
        rows = prompts(dice, dice.randrange(1, 7))
        changes: dict[str, Any] = {"batch_size": dice.choice([None, 3]), "keep_responses": call % 2 == 1}
        changes["static"] = lean and dice.random() < 0.3
        assert_same(decode(model, rows, tree, call, **changes), decode(model, rows, None, call, **changes))
        assert tree.bytes <= tree.room and tree.bytes == sum(node.bytes for node in nodes(tree))
    assert (tree.reused > 0) == (room > 0.01) and (tree.evicted > 0) == (0 < room < 1)


def nodes(tree: PrefixTree) -> list[PrefixNode]:
    found, waiting = [], list(tree.root.children.values())
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += node.children.values()
    return found


def test_three_calls_read_each_prompt_token_once(model: LatentActionLM) -> None:
    rows = [[5, 9, 4, 7], [5, 9, 4, 8, 11], [30, 31]]
    tree = PrefixTree(64)
    for call in range(3):
        assert_same(decode(model, rows, tree, call), decode(model, rows, None, call))
    # By hand: 5 9 4 is shared; then 7, 8 11, 30 31.
    assert tree.computed == 3 + 1 + 2 + 2
    assert tree.reused == 3 * 11 + 3 - tree.computed  # the beginning itself was read as a row of its own


def test_four_turns_read_what_is_new(model: LatentActionLM) -> None:
    """A turn's prompt is all that went before it: what was generated was read while decoding, but its last token."""
    tree, row, needed = PrefixTree(64), [5, 9, 4, 7], 4
    for turn in range(4):
        made = decode(model, [row], tree, turn, repeats=1, keep_responses=True, stop_token=-1)
        assert_same(made, decode(model, [row], None, turn, repeats=1, stop_token=-1))
        assert tree.computed == needed
        row = [*row, *made.tokens[0].tolist(), 40 + turn, 12]
        needed += 3


def test_a_version_changes_nothing_of_the_base(model: LatentActionLM) -> None:
    rows, tree, calls = [[5, 9, 4, 7], [30, 31]], PrefixTree(64), iter(range(99))
    own = {name: t.clone() for name, t in model.policy.state_dict().items()}

    def refresh() -> int:
        now = next(calls)
        if now == 2:
            model.policy.load_state_dict({name: t * 0.5 for name, t in own.items()})
        return int(now >= 2)

    try:
        decode(model, rows, tree, 0)
        after = tree.computed
        with torch.no_grad():
            params = SamplingParams(max_new_tokens=5, seed=3)
            ids, mask = left_padded(rows, torch.device("cpu"))
            shared = generate(model.base, model.actor(), params, ids, mask, refresh=refresh, tree=tree)
            model.policy.load_state_dict(own)
            calls = iter(range(99))
            alone = generate(model.base, model.actor(), params, ids, mask, refresh=refresh)
    finally:
        model.policy.load_state_dict(own)
    assert_same(shared, alone)
    assert torch.equal(shared.versions, alone.versions) and tree.computed == after


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "bloom", "falcon"])
def test_other_architectures(kind: str, make_model: Callable[..., LatentActionLM]) -> None:
    """Sliding windows, learned positions, ALiBi: rows that go on from a prefix are those that do not."""
    import transformers as t

    shape = {"vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**shape, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                           num_key_value_heads=2, head_dim=8, sliding_window=6)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**shape, n_embd=32, n_layer=4, n_head=4, n_positions=64)),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(**shape, hidden_size=32, n_layer=4, n_head=4)),
        "falcon": lambda: t.FalconForCausalLM(
            t.FalconConfig(**shape, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
        ),
    }  # fmt: skip
    torch.manual_seed(3)
    lm = makers[kind]().eval().requires_grad_(False)
    for settings in ({}, KINDS["mlp"]):
        model, tree = make_model(base=lm, **settings), PrefixTree(64)
        stem = [5, 9, 4, 7, 20, 21, 22, 23, 24]
        for call, rows in enumerate([[[*stem, 30]], [[*stem, 31, 8], [*stem, 30], [9, 9]], [[*stem[:5], 3]]]):
            shared = decode(model, rows, tree, call, keep_responses=call == 1)
            assert_same(shared, decode(model, rows, None, call))
        assert tree.reused > 0


def test_beginnings_by_hand() -> None:
    rows = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9], [7], [7, 8], [1, 2, 3, 4]]
    assert shared_beginnings(rows, 1) == [(7,), (1, 2), (1, 2, 3)]
    assert shared_beginnings(rows, 2) == [(1, 2)]
    assert shared_beginnings(rows, 3) == [(1, 2, 3)]
    assert shared_beginnings([[1, 2]], 1) == shared_beginnings([], 1) == []
    assert shared_beginnings([[1] * n for n in range(1, 2000)], 1)[-1] == (1,) * 1998


def test_what_was_used_longest_ago_leaves() -> None:
    tree = PrefixTree(1000 / 2**20)

    def layers(length: int) -> Any:
        return [(torch.ones(1, length, 4), torch.ones(1, length, 4)), None]

    for number in range(10):  # 32 bytes a token, 10 tokens each: three of them fit
        tree.insert([number] * 10, layers(10), None, None)
        tree.match([0] * 10)
    assert sorted(node.tokens[0] for node in tree.root.children.values()) == [0, 8, 9]
    tree.insert([5] * 100, layers(100), None, None)  # larger than the tree
    assert sorted(node.tokens[0] for node in tree.root.children.values()) == [0, 8, 9]
