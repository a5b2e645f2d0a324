"""Many policies in one batch: each row as by its own policy alone, mixes by hand, members that come and go."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from latent_control import LatentActionLM
from latent_control.decoding.engine import Engine
from latent_control.decoding.generate import generate
from latent_control.decoding.guide import make_guide
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.distributions import action_log_probs, sample_actions
from latent_control.model import latent_actor
from latent_control.policies.bank import Blend, PolicyBank, SlotRun, plan
from latent_control.policies.mlp import MlpPolicy
from latent_control.records import Generation

CODES, WIDTH = 8, 32


def policy(seed: int, width: int = 24) -> MlpPolicy:
    """A policy that is surely another one than that of another seed."""
    made, generator = MlpPolicy(WIDTH, CODES, layers=2, width=width), torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return made.requires_grad_(False)


def bank_of(policies: dict[str, MlpPolicy]) -> PolicyBank:
    bank = PolicyBank(policy(0))
    for name, one in policies.items():
        bank.put(name, one.state_dict())
    return bank


def test_runs_by_hand() -> None:
    """Slots 2, 2, 3, 3, 4, 7: two neighbours with two rows each are one product; 4 has one row, 7 is no neighbour."""
    made = plan((3, 2, 7, 2, 3, 4), torch.device("cpu"))
    assert made.runs == (SlotRun(2, 2, 2), SlotRun(4, 1, 1), SlotRun(7, 1, 1))
    assert made.slots.tolist() == [2, 2, 3, 3, 4, 7] and made.order.tolist() == [1, 3, 0, 4, 5, 2]
    assert made.order[made.back].tolist() == list(range(6))


@pytest.mark.parametrize("seed", range(12))
def test_each_row_is_as_by_its_own_policy_while_versions_are_replaced(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    alone = {f"p{index}": policy(100 * seed + index) for index in range(rng.choice([1, 2, 5, 17]))}
    bank = bank_of(alone)
    for step in range(4):
        name = rng.choice(list(alone))
        alone[name] = policy(1000 + 10 * seed + step)
        bank.put(name, alone[name].state_dict())
        if len(alone) > 2 and step % 2:
            alone.pop(gone := rng.choice(list(alone)))
            bank.remove(gone)
        names = [rng.choice(list(alone)) for _ in range(rng.choice([1, 3, 40]))]
        states = torch.randn(len(names), WIDTH, generator=generator)
        found = bank.logits(states, [bank.blend(name) for name in names])
        wanted = torch.stack([alone[name](state) for name, state in zip(names, states, strict=True)])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        for name, one in alone.items():
            kept = bank.weights(name)
            assert all(torch.equal(kept[key], tensor) for key, tensor in one.state_dict().items())


def test_a_mix_by_hand() -> None:
    one, other = policy(1), policy(2)
    bank = bank_of({"one": one, "other": other})
    states = torch.randn(3, WIDTH)
    blends = [bank.blend({"one": 0.7, "other": 0.3}), bank.blend("other"), bank.blend({"other": 2.0})]
    found = bank.logits(states, blends).log_softmax(-1)
    first = one(states[0]).softmax(-1) ** 0.7 * other(states[0]).softmax(-1) ** 0.3
    wanted = torch.stack([first / first.sum(), other(states[1]).softmax(-1), (2 * other(states[2])).softmax(-1)])
    torch.testing.assert_close(found.exp(), wanted, rtol=0, atol=1e-5)


def test_a_slot_is_free_when_no_row_holds_its_member() -> None:
    bank = bank_of({"one": policy(1), "two": policy(2)})
    under_way: Blend | None = bank.blend("two")
    bank.remove("two")
    bank.put("three", policy(3).state_dict())
    states = torch.randn(1, WIDTH)
    assert under_way is not None
    torch.testing.assert_close(bank.logits(states, [under_way]), policy(2)(states), rtol=0, atol=1e-5)
    slot, under_way = under_way[0][0].slot, None
    gc.collect()
    assert bank.put("four", policy(4).state_dict()).slot == slot
    torch.testing.assert_close(bank.logits(states, [bank.blend("three")]), policy(3)(states), rtol=0, atol=1e-5)


def test_a_further_policy_takes_little_more_than_its_own_bytes() -> None:
    bank, own = PolicyBank(policy(0)), sum(tensor.nbytes for tensor in policy(0).state_dict().values())
    for count in range(1, 200):
        bank.put(str(count), policy(0).state_dict())
        held = sum(buffer.untyped_storage().nbytes() for buffer in bank.network.buffers())
        assert held <= 1.2 * own * count, count


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nobody", "there is no policy 'nobody'; there are one, two"),
        ({}, "0 policies are mixed: give 1 to 16"),
        ({"one": 0.0}, "the weight of 'one' is 0.0: give a number above 0 and up to 16"),
        ({"one": float("nan")}, "the weight of 'one' is nan"),
        ({"one": True}, "the weight of 'one' is True"),
        ({"one": 1.0, "two": "2"}, "the weight of 'two' is '2'"),
        ({"one": 1e30}, "the weight of 'one' is 1e\\+30"),
    ],
)
def test_blends_that_cannot_be_are_refused(asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bank_of({"one": policy(1), "two": policy(2)}).blend(asked)


def test_another_shape_is_refused() -> None:
    bank = bank_of({"one": policy(1)})
    with pytest.raises(ValueError, match=r"'wide' is not of the bank's shape: enter.bias is \(25,\), not \(24,\)"):
        bank.put("wide", policy(1, width=25).state_dict())
    assert list(bank.members) == ["one"]


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LatentActionLM]) -> LatentActionLM:
    return make_model(policy_kind="mlp", policy_width=24)


ALONE = {f"p{index}": policy(index) for index in range(5)}


def decode(model: LatentActionLM, bank: PolicyBank, prompts: list[list[int]], **params: Any) -> Generation:
    widest = max(map(len, prompts))
    ids = torch.tensor([[0] * (widest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    static = params.pop("static", False)
    return generate(model.base, latent_actor(model, bank), SamplingParams(**params), ids, mask, static=static)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("static", [False, True])
def test_a_row_is_the_same_whoever_its_neighbours_are(model: LatentActionLM, seed: int, static: bool) -> None:
    """Mixed with others, on few slots, against the model whose own policy is the row's member."""
    rng, bank = random.Random(seed), bank_of(ALONE)
    prompts = [[rng.randrange(4, 30) for _ in range(rng.randrange(1, 6))] for _ in range(7)]
    names = [rng.choice(list(ALONE)) for _ in prompts]
    common: dict[str, Any] = {"max_new_tokens": 6, "repeats": 2, "return_features": True}
    seeds = list(range(100, 100 + 2 * len(prompts)))
    made = decode(
        model, bank, prompts, members=[bank.blend(name) for name in names], row_seeds=seeds, batch_size=5,
        static=static, **common,
    )  # fmt: skip
    assert len(set(made.actions.flatten().tolist())) > 4
    own, features = model.policy, made.features
    assert features is not None
    try:
        for place, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            model.policy = ALONE[name]
            single = decode(model, bank, [prompt], row_seeds=seeds[2 * place : 2 * place + 2], **common)
            rows = slice(2 * place, 2 * place + 2)
            assert torch.equal(made.tokens[rows], single.tokens) and torch.equal(made.actions[rows], single.actions)
            torch.testing.assert_close(made.action_logp[rows], single.action_logp, rtol=0, atol=1e-5)
            for row, length in zip(range(rows.start, rows.stop), made.lengths[rows].tolist(), strict=True):
                logp = ALONE[name](features[row]).log_softmax(-1)
                wanted = logp.gather(-1, made.actions[row, :length, None])[:, 0]
                torch.testing.assert_close(made.action_logp[row, :length], wanted, rtol=0, atol=1e-4)
    finally:
        model.policy = own


def test_no_banned_code_was_chosen_by_enumeration(model: LatentActionLM) -> None:
    """All rows' codes, and at every state all codes: a banned one has no share of [0, 1), wherever the draw falls."""
    bank, banned = bank_of(ALONE), {1, 4, 6}
    names = [*ALONE, {"p0": 0.5, "p3": 0.5}]
    blends = [bank.blend(name) for name in names]
    guide = make_guide(None, sorted(set(range(CODES)) - banned), rows=6 * 20, num_actions=CODES)
    prompts = [[5, 9, 11 + index] for index in range(6)]
    params: dict[str, Any] = {"max_new_tokens": 6, "repeats": 20, "seed": 1, "temperature": 1.5, "members": blends}
    free = decode(model, bank, prompts, **params)
    assert banned < set(free.actions.flatten().tolist()), "without the ban they are chosen"
    made = decode(model, bank, prompts, guide=guide, return_features=True, **params)
    assert not banned & set(made.actions.flatten().tolist())
    draws = torch.tensor([0.0, *torch.linspace(0, 1, 101)[1:-1].tolist(), 1 - 2**-53], dtype=torch.float64)
    assert made.features is not None and guide is not None
    for row, states in enumerate(made.features):
        count = len(states)
        logits = guide.apply(bank.logits(states, [blends[row // 20]] * count), [row] * count, [0] * count)
        for log_probs in action_log_probs(logits, temperature=1.5):
            assert {code for code in range(CODES) if log_probs[code] == float("-inf")} == banned
            assert not banned & set(sample_actions(log_probs.expand(len(draws), -1), draws).tolist())


def test_a_member_is_replaced_under_way(model: LatentActionLM) -> None:
    """Rows wait for slots meanwhile; each choice is that of the version it is said to be of."""
    bank, versions = bank_of(ALONE), [policy(1), policy(77)]
    blend, steps = bank.blend("p1"), itertools.count()

    def refresh() -> int:
        version = int(next(steps) >= 3)
        bank.put("p1", versions[version].state_dict())
        return version

    params = SamplingParams(
        max_new_tokens=5, row_seeds=range(8), batch_size=3, repeats=2, members=[blend] * 4, return_features=True
    )
    engine = Engine(
        model.base, latent_actor(model, bank), params, torch.tensor([[5, 9], [7, 8], [4, 6], [3, 9]]), refresh=refresh
    )
    with torch.no_grad():
        made = engine.run()
    assert made.features is not None and {0, 1} <= set(made.versions.flatten().tolist())
    for row, length in enumerate(made.lengths.tolist()):
        for place in range(length):
            logp = versions[int(made.versions[row, place])](made.features[row][place]).log_softmax(-1)
            assert abs(float(made.action_logp[row, place] - logp[made.actions[row, place]])) < 1e-4


def test_members_need_a_bank_and_one_for_each_prompt(model: LatentActionLM) -> None:
    bank = bank_of(ALONE)
    with pytest.raises(ValueError, match="members names policies for 1 of 2 prompts, of the bank"):
        decode(model, bank, [[5], [6]], max_new_tokens=2, members=[bank.blend("p1")])
    with pytest.raises(ValueError, match="of no bank"):
        model.generate(torch.tensor([[5]]), max_new_tokens=2, members=[bank.blend("p1")])
