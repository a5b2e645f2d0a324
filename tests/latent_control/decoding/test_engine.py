"""The decoding engine: continuous batching, lean blocks, and a policy that changes under way (method.md 7.2 to 7.4)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import SHAPE as SMALL
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from latent_control import Generation, LatentActionLM
from latent_control.decoding import generate as decoding
from latent_control.decoding import prefill, static_engine
from latent_control.decoding.engine import Engine
from latent_control.decoding.generate import generate
from latent_control.decoding.lean_blocks import lean_blocks
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.decoding.static_engine import StaticEngine
from latent_control.distributions import action_log_probs, rollout_seed, sample_actions, uniform_streams
from latent_control.linear import linear

VOCABULARY = 48
CLOSE = {"rtol": 0.0, "atol": 1e-4}


def padded(lengths: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts, left padded: (ids [B, P], mask [B, P])."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.full((len(lengths), max(lengths)), 17), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = torch.randint(3, VOCABULARY, (length,), generator=generator), 1
    return ids, mask


def same(one: Generation, other: Generation) -> None:
    """Both hold the same rollouts."""
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.actions, other.actions)
    assert one.lengths.tolist() == other.lengths.tolist()
    torch.testing.assert_close(one.action_logp, other.action_logp, **CLOSE)
    for mine, theirs in zip(one.features or (), other.features or (), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.fixture(params=["lean", "transformers", "static"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Decode with the lean blocks, with the base's own, or on tensors of fixed size (often moved to the left)."""
    if request.param == "transformers":
        monkeypatch.setattr(prefill, "lean_blocks", lambda decoder: None)
    if request.param == "static":
        monkeypatch.setattr(decoding, "Engine", StaticEngine)
        monkeypatch.setattr(static_engine, "ROOM", 2)
    return request.param


# -- continuous batching -----------------------------------------------------------------------------------------------


def test_waiting_rows_enter_as_others_leave(
    model: LatentActionLM, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = padded((4, 11, 6, 3, 9, 5, 7))
    limits = [2, 14, 3, 9, 1, 6, 4, 2, 12, 3, 5, 1, 8, 2]
    settings: dict[str, Any] = {
        "max_new_tokens": limits,
        "seed": 5,
        "repeats": 2,
        "stop_token": -1,
        "return_features": True,
    }
    whole = model.generate(ids, mask, **settings)
    live: list[int] = []
    choose = Engine._choose
    monkeypatch.setattr(
        Engine, "_choose", lambda self, slots, *rest: (live.append(len(slots)), choose(self, slots, *rest))
    )
    few = model.generate(ids, mask, batch_size=4, **settings)
    same(few, whole)
    assert max(live) == 4
    # Prompts before the last one are behind: whenever rows wait, all slots are busy.
    assert live[:13] == [4] * 13
    # what batch after batch would take
    assert len(live) < sum(max(limits[start : start + 4]) for start in range(0, 14, 4))
    assert sum(live) == sum(limits)


def test_columns_are_dropped_and_added_as_rows_come_and_go(model: LatentActionLM, blocks: str) -> None:
    """One long row among many short ones, and a long prompt that enters late: the memory is laid out anew several
    times."""
    ids, mask = padded((3, 2, 4, 2, 3, 30, 2, 3))
    limits = [40, 3, 4, 2, 3, 20, 5, 3]
    arguments: dict[str, Any] = {"max_new_tokens": limits, "seed": 5, "stop_token": -1, "return_features": True}
    whole, few = model.generate(ids, mask, **arguments), model.generate(ids, mask, batch_size=2, **arguments)
    same(few, whole)
    alone = model.generate(ids[5:6], mask[5:6], max_new_tokens=20, row_seeds=[rollout_seed(5, 5)], stop_token=-1)
    assert torch.equal(alone.tokens[0], few.tokens[5, :20])


@pytest.mark.parametrize("reads", [("final", "final"), ("late", "final")])
def test_other_reading_places(make_model: Callable[..., LatentActionLM], blocks: str, reads: tuple[str, str]) -> None:
    model = make_model(inverse_dynamics_reads=reads[0], policy_reads=reads[1])
    ids, mask = padded((4, 7, 2, 5, 6))
    arguments: dict[str, Any] = {
        "max_new_tokens": [3, 8, 5, 2, 6],
        "seed": 1,
        "stop_token": -1,
        "return_features": True,
    }
    same(model.generate(ids, mask, batch_size=2, **arguments), model.generate(ids, mask, **arguments))


def test_static_steps_read_and_write_the_same_tensors(model: LatentActionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph relies on, over rows that come, go, and are moved."""
    monkeypatch.setattr(static_engine, "ROOM", 2)
    places: set[tuple[int, ...]] = set()
    compute = StaticEngine._compute

    def watch(self: StaticEngine) -> Any:
        tensors = [
            self.next_tokens,
            self.position,
            self.memory.column,
            *(buffer.data for buffer in self.memory.buffers),
        ]
        places.add(tuple(tensor.data_ptr() for tensor in tensors))
        return compute(self)

    monkeypatch.setattr(StaticEngine, "_compute", watch)
    ids, mask = padded((3, 2, 4, 2, 3, 30, 2, 3))
    limits = [40, 3, 4, 2, 3, 20, 5, 3]
    params = SamplingParams(max_new_tokens=limits, row_seeds=range(8), stop_token=-1, batch_size=2)
    got = generate(model.base, model.actor(), params, ids, mask, static=True)
    assert len(places) == 1
    same(got, generate(model.base, model.actor(), params, ids, mask))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_a_replayed_graph_decodes_the_same(model: LatentActionLM) -> None:
    on_gpu = copy.deepcopy(model).to("cuda")
    ids, mask = (tensor.cuda() for tensor in padded((4, 11, 6, 3, 9, 5, 7)))
    params = SamplingParams(max_new_tokens=24, row_seeds=range(7), stop_token=-1, batch_size=3)
    same(*(generate(on_gpu.base, on_gpu.actor(), params, ids, mask, static=way) for way in (True, False)))


def test_static_needs_blocks_it_knows(model: LatentActionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "lean_blocks", lambda decoder: None)
    with pytest.raises(ValueError, match="static caches need Llama-shaped blocks"):
        generate(model.base, model.actor(), SamplingParams(max_new_tokens=2), *padded((3,)), static=True)


# -- a policy that changes under way -----------------------------------------------------------------------------------


@torch.no_grad()
def changing_rollout(
    models: list[LatentActionLM], change_at: int, prompt: torch.Tensor, limit: int, stream: int
) -> tuple[list[int], list[int], list[float]]:
    """(actions, tokens, log-probabilities) without any cache; from step ``change_at`` on by the second model's
    policy."""
    uniforms, row = uniform_streams([stream], limit)[0], prompt.tolist()
    actions: list[int] = []
    logps: list[float] = []
    for step in range(limit):
        model = models[step >= change_at]
        features = model.features(torch.tensor([row]))
        log_probs = action_log_probs(model.policy_logits(features)[:, -1])
        action = int(sample_actions(log_probs, uniforms[step : step + 1]))
        actions.append(action), logps.append(float(log_probs[0, action]))
        row.append(int(model.world_logits(features, torch.full((1, len(row)), action))[0, -1].argmax()))
    return actions, row[len(prompt) :], logps


@torch.no_grad()
def changed(model: LatentActionLM) -> LatentActionLM:
    """The model with another policy."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.policy.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def test_a_new_policy_goes_on_as_after_a_fresh_prefill(make_model: Callable[..., LatentActionLM], blocks: str) -> None:
    model, before, new = make_model(), make_model(), changed(make_model())
    ids, mask = padded((5, 3, 8))
    asked: list[int] = []
    base_passes: list[int] = []
    features = type(model.base).features

    def refresh() -> int:
        asked.append(1)
        if len(asked) == 1 + 4 + 1:  # once at the start, then before each step: before step 4
            with torch.no_grad():
                for mine, theirs in zip(model.policy.parameters(), new.policy.parameters(), strict=True):
                    mine.copy_(theirs)
        return 7 if len(asked) > 5 else 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(model.base), "features", lambda self, x, *a: (base_passes.append(x.shape[1]), features(self, x, *a))[1]
        )
        got = generate(
            model.base,
            model.actor(),
            SamplingParams(max_new_tokens=10, row_seeds=[1, 2, 3], stop_token=-1),
            ids,
            mask,
            refresh=refresh,
        )
    assert all(width == 1 for width in base_passes[1:])  # the base never reads a prompt twice
    assert got.versions.tolist() == [[3] * 4 + [7] * 6] * 3
    for row in range(3):
        actions, tokens, logps = changing_rollout([before, new], 4, ids[row][mask[row].bool()], 10, row + 1)
        assert got.actions[row].tolist() == actions
        assert got.tokens[row].tolist() == tokens
        torch.testing.assert_close(got.action_logp[row], torch.tensor(logps), **CLOSE)
    unchanged = changing_rollout([before, before], 0, ids[0][mask[0].bool()], 10, 1)[0]
    assert got.actions[0].tolist() != unchanged, "the new policy must matter"


def test_a_new_policy_also_reads_the_prompts_that_wait(make_model: Callable[..., LatentActionLM], blocks: str) -> None:
    """Rows that enter after the change are as if the policy had never been another."""
    model, new = make_model(), changed(make_model())
    old = {name: p.clone() for name, p in model.policy.state_dict().items()}
    ids, mask = padded((5, 3, 8, 4))
    calls: list[int] = []

    def refresh() -> int:
        calls.append(1)
        if len(calls) == 3:
            model.policy.load_state_dict(new.policy.state_dict())
        return int(len(calls) >= 3)

    params = SamplingParams(max_new_tokens=[6, 6, 6, 6], row_seeds=[1, 2, 3, 4], stop_token=-1, batch_size=2)
    got = generate(model.base, model.actor(), params, ids, mask, refresh=refresh)
    expected = generate(model.base, model.actor(), params, ids, mask)
    assert torch.equal(got.actions[2:], expected.actions[2:])
    assert got.versions[2:].tolist() == [[1] * 6] * 2
    model.policy.load_state_dict(old)
    assert not torch.equal(generate(model.base, model.actor(), params, ids, mask).actions[2:], expected.actions[2:])


# -- lean blocks -------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": False},
    "llama-scaled": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


def small_base(kind: str) -> PreTrainedModel:
    """A random LM of the kind."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(kind.split("-")[0], **SMALL | KINDS[kind])
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_lean_blocks_equal_the_bases_own(
    make_model: Callable[..., LatentActionLM], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = make_model(base=small_base(kind), policy_layers=1, inverse_dynamics_layers=1)
    if kind == "llama":
        for bias in (p for name, p in model.named_parameters() if name.endswith("bias")):
            torch.nn.init.normal_(bias, std=0.3)
    ids, mask = padded((4, 9, 6, 3))
    arguments: dict[str, Any] = {
        "max_new_tokens": [7, 5, 9, 8],
        "seed": 3,
        "stop_token": -1,
        "batch_size": 3,
        "return_features": True,
    }
    assert lean_blocks(model.base.decoder) is not None
    lean = model.generate(ids, mask, **arguments)
    monkeypatch.setattr(prefill, "lean_blocks", lambda decoder: None)
    same(lean, model.generate(ids, mask, **arguments))


def test_other_kinds_keep_their_own_blocks() -> None:
    for settings in ({"model_type": "gpt2"}, {"model_type": "mistral", "sliding_window": 8} | SMALL):
        kind = settings.pop("model_type")
        assert (
            lean_blocks(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).get_decoder()) is None
        )


def test_adapted_linear_layers_keep_the_bases_own_blocks(base: PreTrainedModel) -> None:
    class Adapted(torch.nn.Linear):
        """As peft and quantisation replace layers."""

    decoder = base.get_decoder()
    assert lean_blocks(decoder) is not None
    old = decoder.layers[1].mlp.up_proj
    decoder.layers[1].mlp.up_proj = Adapted(old.in_features, old.out_features, bias=False)
    assert lean_blocks(decoder) is None


def test_weights_changed_in_place_or_converted_are_seen(
    make_model: Callable[..., LatentActionLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    ids, mask = padded((4, 6))
    arguments: dict[str, Any] = {"max_new_tokens": 8, "seed": 3, "stop_token": -1}
    first = model.generate(ids, mask, **arguments)
    trained = copy.deepcopy(model.policy)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.5)
    for change in (
        lambda: model.policy.load_state_dict(trained.state_dict()),
        lambda: model.double(),
        lambda: model.float(),
    ):
        change()
        with monkeypatch.context() as patch:
            patch.setattr(prefill, "lean_blocks", lambda decoder: None)
            expected = model.generate(ids, mask, **arguments)
        same(model.generate(ids, mask, **arguments), expected)
        assert not torch.equal(expected.actions, first.actions)


def test_a_model_that_has_decoded_still_trains_and_saves(
    make_model: Callable[..., LatentActionLM], tmp_path: Path
) -> None:
    """Joined weights are views: an optimiser's steps and a checkpoint must see the very same numbers."""
    model = make_model()
    ids, mask = padded((4, 6))
    model.generate(ids, mask, max_new_tokens=2, seed=0)
    optimizer = torch.optim.AdamW(model.policy.parameters(), lr=0.05)
    fresh = make_model()
    reference = torch.optim.AdamW(fresh.policy.parameters(), lr=0.05)
    for each, steps in ((model, optimizer), (fresh, reference)):
        for _ in range(2):
            steps.zero_grad()
            each.policy_logits(each.features(ids)).square().mean().backward()
            steps.step()
    for mine, theirs in zip(model.policy.parameters(), fresh.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    same(model.generate(ids, mask, max_new_tokens=6, seed=0), fresh.generate(ids, mask, max_new_tokens=6, seed=0))
    model.save_pretrained(tmp_path / "saved", bundle_base=True)
    same(
        LatentActionLM.from_pretrained(tmp_path / "saved").generate(ids, mask, max_new_tokens=6, seed=0),
        fresh.generate(ids, mask, max_new_tokens=6, seed=0),
    )


@pytest.mark.parametrize(("rows", "bias"), [(3, False), (40, False), (40, True)])
def test_linear_is_the_product_in_full_float32(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 2, 64, generator=generator), torch.randn(96, 64, generator=generator)
    added = torch.randn(96, generator=generator) if bias else None
    exact = x.double() @ weight.double().T + (0 if added is None else added.double())
    with torch.no_grad():
        found = linear(x, weight, added)
    # bfloat16 inside would be off by about 0.05.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)
    x.requires_grad_()
    linear(x, weight, added).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(rows, 2, 64), rtol=1e-4, atol=1e-4)
