"""The model: identity start, no leakage, decoder stacks, merge, persistence, published checkpoints, other architectures
(method.md 7)."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from latent_control import LatentActionConfig, LatentActionLM
from latent_control.base_lm import BaseLM
from latent_control.decoder_stack import DecoderStack, decoder_blocks
from latent_control.merge import Merge
from latent_control.pretrained import base_hash, base_path, load_policy, with_policy, world_hash
from latent_control.token_policy import Trains, WholeModel, token_policy

MakeModel = Callable[..., LatentActionLM]
MakeBase = Callable[..., PreTrainedModel]
CODES, VOCABULARY = 8, 48
CLOSE = {"rtol": 0.0, "atol": 1e-5}
PARITY = Path(__file__).parents[1] / "fixtures" / "official_parity"


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids [rows, length] without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


# -- 1. identity start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"policy_reads": "final", "inverse_dynamics_reads": "final", "merge_layers": 3}]
)
@torch.no_grad()
def test_untrained_world_model_is_the_base_bit_for_bit(make_model: MakeModel, settings: dict[str, Any]) -> None:
    model, ids = make_model(untrained=True, **settings), tokens(3, 11)
    features, expected = model.features(ids), model.base.lm(ids).logits
    for code in range(CODES):
        assert torch.equal(model.world_logits(features, torch.full((3, 11), code)), expected), code
    assert torch.equal(
        model.world_logits_from_codes(features.read("final"), model.codebook[tokens(3, 11) % CODES]), expected
    )


@torch.no_grad()
def test_untrained_world_model_is_a_bfloat16_base_bit_for_bit(make_model: MakeModel, make_base: MakeBase) -> None:
    """The new modules work in float32 or, cast, in the base's dtype: neither may round the features."""
    model, ids = make_model(untrained=True, base=make_base().bfloat16()), tokens(2, 9)
    for cast in (False, True):
        if cast:
            model.cast_modules()
        features = model.features(ids)
        expected = model.base.lm(ids).logits
        assert expected.dtype == torch.bfloat16
        for code in range(CODES):
            assert torch.equal(model.world_logits(features, torch.full((2, 9), code)), expected), (cast, code)


@torch.no_grad()
def test_after_training_the_code_matters(model: LatentActionLM) -> None:
    features = model.features(tokens(3, 11))
    first, second = (model.world_logits(features, torch.full((3, 11), code)) for code in (0, 1))
    assert float((first - second).abs().mean()) > 0.1


@torch.no_grad()
def test_generation_at_the_start_is_the_base_whatever_the_codes(make_model: MakeModel) -> None:
    model, ids = make_model(untrained=True), tokens(3, 6)
    sampled = model.generate(ids, max_new_tokens=8, seed=1)
    assert len(set(sampled.actions[:, :2].flatten().tolist())) > 1
    assert torch.equal(sampled.tokens, model.generate(ids, max_new_tokens=8, temperature=0.0, level="base").tokens)


# -- 2. no leakage -----------------------------------------------------------------------------------------------------


def changed_after(ids: torch.Tensor, position: int) -> torch.Tensor:
    """``ids`` with every token after ``position`` replaced by another."""
    other = ids.clone()
    other[:, position + 1 :] = 3 + (other[:, position + 1 :] - 3 + 7) % (VOCABULARY - 3)
    return other


@pytest.mark.parametrize("reads", ["late", "final"])
@torch.no_grad()
def test_nothing_at_t_depends_on_later_tokens(make_model: MakeModel, reads: str) -> None:
    model, ids, actions = (
        make_model(policy_reads=reads, inverse_dynamics_reads=reads),
        tokens(4, 12),
        tokens(4, 12, 1) % CODES,
    )
    features = model.features(ids)
    policy, world, labels = (
        model.policy_logits(features),
        model.world_logits(features, actions),
        model.inverse_dynamics_logits(features),
    )
    for t in range(11):
        other = model.features(changed_after(ids, t))
        now = slice(0, t + 1)
        torch.testing.assert_close(other.read("final")[:, now], features.read("final")[:, now], **CLOSE)
        torch.testing.assert_close(model.policy_logits(other)[:, now], policy[:, now], **CLOSE)
        torch.testing.assert_close(model.world_logits(other, actions)[:, now], world[:, now], **CLOSE)
        # u at position t labels the action taken at t - 1: l_{t-1} = u_t sees x_{1:t} and nothing beyond.
        torch.testing.assert_close(model.inverse_dynamics_logits(other)[:, now], labels[:, now], **CLOSE)
        # ... and what comes later does depend on the changed tokens.
        assert float((model.policy_logits(other)[:, t + 1 :] - policy[:, t + 1 :]).abs().max()) > 1e-2
        assert float((model.inverse_dynamics_logits(other)[:, t + 1] - labels[:, t + 1]).abs().max()) > 1e-2


@torch.no_grad()
def test_labels_see_one_token_ahead(model: LatentActionLM) -> None:
    ids = tokens(16, 12)
    labels = model.label_actions(ids)
    assert labels.shape == (16, 11)
    assert torch.equal(labels, model.inverse_dynamics_logits(model.features(ids)).argmax(-1)[:, 1:])
    for t in (0, 5, 9):
        # a_t may change with x_{t+1}; a_0 .. a_{t-1} may not.
        relabelled = model.label_actions(changed_after(ids, t))
        assert torch.equal(relabelled[:, :t], labels[:, :t])
        assert not torch.equal(relabelled[:, t], labels[:, t])


@torch.no_grad()
def test_a_code_changes_its_own_position_only(model: LatentActionLM) -> None:
    """State is text only: past codes are not fed back."""
    features, actions = model.features(tokens(2, 8)), torch.zeros(2, 8, dtype=torch.long)
    before = model.world_logits(features, actions)
    actions[:, 4] = 5
    differs = (model.world_logits(features, actions) - before).abs().amax((0, 2)) > 1e-4
    assert differs.tolist() == [False] * 4 + [True] + [False] * 3


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing_whatever_it_holds(model: LatentActionLM, side: str) -> None:
    short, long = tokens(1, 5), tokens(1, 9, 1)
    expected = model.features(short)
    for filler in (0, 17):
        ids = torch.full((2, 9), filler)
        place = slice(4, 9) if side == "left" else slice(0, 5)
        ids[0, place], ids[1] = short[0], long[0]
        mask = torch.zeros(2, 9, dtype=torch.long)
        mask[0, place], mask[1] = 1, 1
        features = model.features(ids, mask)
        for name in ("final", "late"):
            torch.testing.assert_close(features.read(name)[0, place], expected.read(name)[0], **CLOSE)
        torch.testing.assert_close(
            model.policy_logits(features, mask)[0, place], model.policy_logits(expected)[0], rtol=0, atol=1e-4
        )
        labels = model.inverse_dynamics_logits(features, mask)[0, place]
        torch.testing.assert_close(labels, model.inverse_dynamics_logits(expected)[0], rtol=0, atol=1e-4)


# -- decoder stacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 3])
@torch.no_grad()
def test_a_late_stack_starts_as_the_bases_last_blocks(make_model: MakeModel, blocks: int) -> None:
    model, ids = make_model(policy_layers=blocks, inverse_dynamics_layers=blocks), tokens(3, 10)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    features = model.features(ids, mask)
    real = mask.bool()
    for stack in (model.policy, model.inverse_dynamics):
        assert torch.equal(stack.hidden(features.late, mask)[real], features.final[real])


@torch.no_grad()
def test_late_is_the_state_that_enters_the_last_blocks(make_model: MakeModel) -> None:
    model, ids = make_model(policy_layers=1, inverse_dynamics_layers=1), tokens(2, 6)
    states = model.base.lm(ids, output_hidden_states=True).hidden_states  # embeddings, then each block's output
    assert torch.equal(model.features(ids).late, states[3])


@torch.no_grad()
def test_a_final_stack_starts_fresh_and_reproducibly(make_model: MakeModel, make_base: MakeBase) -> None:
    settings: dict[str, Any] = {"policy_reads": "final", "inverse_dynamics_reads": "final", "untrained": True}
    first, second, third = (make_model(seed=seed, **settings).new_modules() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["policy.head.weight"], third["policy.head.weight"])
    own = first["policy.decoder.layers.1.mlp.down_proj.weight"]
    assert not torch.equal(own, make_base().model.layers[3].mlp.down_proj.weight)


def test_a_seed_leaves_torchs_global_stream_alone(make_model: MakeModel, make_base: MakeBase) -> None:
    base, before = make_base(), torch.random.get_rng_state()
    make_model(base=base)
    assert torch.equal(before, torch.random.get_rng_state())


@torch.no_grad()
def test_a_stack_is_the_same_in_training_mode(make_model: MakeModel) -> None:
    """Dropout in the learner would break the agreement with the sampler's log-probabilities."""
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=3, n_head=4, n_positions=64, eos_token_id=2, pad_token_id=0
    )
    assert config.resid_pdrop > 0
    model = make_model(base=AutoModelForCausalLM.from_config(config))
    features = model.features(tokens(2, 8))
    before = model.policy_logits(features)
    model.policy.train()
    assert torch.equal(model.policy_logits(features), before)


def test_only_the_base_is_frozen(model: LatentActionLM) -> None:
    assert not any(p.requires_grad for p in model.base.parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("base."))
    assert not model.features(tokens(1, 4)).final.requires_grad
    assert model.policy_logits(model.features(tokens(1, 4))).requires_grad


def test_gradients_reach_a_base_that_asks_for_them(make_model: MakeModel) -> None:
    model = make_model()
    model.base.lm.requires_grad_(True)
    model.world_logits(model.features(tokens(1, 4)), torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert float(model.base.decoder.embed_tokens.weight.grad.abs().sum()) > 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("trains", "reads"), [("last_blocks", "late"), ("steering", "late"), ("added_blocks", "final"), ("mlp", "final")]
)
def test_token_policy_starts_as_the_base(make_base: MakeBase, trains: Trains, reads: str) -> None:
    ids = tokens(2, 9)
    base, policy = token_policy(make_base(), trains, 2)
    assert torch.equal(policy.head(policy.hidden(base.features(ids).read(reads))), base.lm(ids).logits)
    assert not any(p.requires_grad for p in policy.head.parameters())
    policy.head.weight.zero_()  # its own copy
    assert float(base.lm.lm_head.weight.abs().sum()) > 0


def test_a_whole_model_is_a_policy_on_tokens(make_base: MakeBase) -> None:
    lm, ids = make_base(), tokens(2, 9)
    base, policy = token_policy(lm, "all", 0)
    assert isinstance(policy, WholeModel) and policy.base is base
    assert torch.equal(policy.head(policy.hidden(ids)), lm(ids).logits)
    assert {id(p) for p in policy.trainable()} == {id(p) for p in lm.parameters()}


def test_added_blocks_have_as_many_parameters_and_learn(make_base: MakeBase) -> None:
    lm, ids = make_base(), tokens(2, 9)
    base, policy = token_policy(lm, "added_blocks", 2)
    blocks = list(base.decoder.layers)[-2:]
    assert sum(p.numel() for p in policy.trainable() if p.requires_grad) == sum(
        p.numel() for b in blocks for p in b.parameters()
    )
    policy.head(policy.hidden(base.features(ids).final)).square().sum().backward()
    moved = [name for name, p in policy.named_parameters() if p.requires_grad and float(p.grad.abs().sum()) > 0]
    assert moved and all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in moved), (
        "the first step opens the blocks"
    )


def test_steering_vectors_are_what_each_block_adds(make_base: MakeBase) -> None:
    """A bias b on what the last block adds moves the state before the final norm by b at every position."""
    ids = tokens(2, 9)
    base, policy = token_policy(make_base(), "steering", 1)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert sorted(name.rsplit(".", 2)[-2] for name in trained) == ["down_proj", "o_proj"]
    assert all(p.shape == (32,) for p in trained.values())
    shift = torch.linspace(-1, 1, 32)
    next(p for name, p in trained.items() if "down_proj" in name).data.copy_(shift)
    blocks = decoder_blocks(base.decoder)[1]
    blocks[-1].register_forward_hook(lambda _, __, state: state + shift)
    wanted = base.lm(ids).logits
    assert torch.allclose(policy.head(policy.hidden(base.features(ids).late)), wanted, atol=1e-5)


def test_the_first_step_of_a_shifting_mlp_is_its_last_layers(make_base: MakeBase) -> None:
    base, policy = token_policy(make_base(), "mlp", 2)
    policy(base.features(tokens(2, 9)).final).square().sum().backward()
    moved = [name for name, p in policy.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0]
    assert moved == ["shift.head.weight"]


@torch.no_grad()
def test_dropping_late_blocks_keeps_late_and_frees_the_rest(make_base: MakeBase) -> None:
    base, ids = BaseLM(make_base(), late_blocks=2), tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = base.features(ids, mask).late
    count = sum(p.numel() for p in base.parameters())
    freed = (
        sum(p.numel() for block in decoder_blocks(base.decoder)[1][-2:] for p in block.parameters()) + VOCABULARY * 32
    )
    base.drop_late_blocks()
    features = base.features(ids, mask)
    assert torch.equal(features.late, expected)
    assert features.final is None
    assert sum(p.numel() for p in base.parameters()) == count - freed
    with pytest.raises(AssertionError, match="no 'final' state"):
        features.read("final")


# -- merge -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_merge_block_by_hand() -> None:
    """One block, width 1, inner 1: s + d * silu(g_s s + g_c c) * (u_s s + u_c c)."""
    merge = Merge(1, 1, 1, identity_start=False)
    block = merge.blocks[0]
    block.gate_proj.weight.copy_(torch.tensor([[1.0, 2.0]]))
    block.up_proj.weight.copy_(torch.tensor([[3.0, -1.0]]))
    block.down_proj.weight.fill_(0.5)
    gate, up = 2.0 + 2 * 1.0, 3 * 2.0 - 1.0  # s = 2, c = 1
    expected = 2.0 + 0.5 * gate / (1 + np.exp(-gate)) * up
    assert float(merge(torch.tensor([2.0]), torch.tensor([1.0]))) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_lookup_equals_forward(model: LatentActionLM) -> None:
    features, actions = model.features(tokens(3, 7)).final, tokens(3, 7, 1) % CODES
    table = model.merge.table(model.codebook)
    assert [(tuple(weight.shape), tuple(terms.shape)) for weight, terms in table] == [
        ((2 * 64, 32), (CODES, 2 * 64))
    ] * 2
    torch.testing.assert_close(
        model.merge.lookup(features, actions, table), model.merge(features, model.codebook[actions]), **CLOSE
    )


@torch.no_grad()
def test_all_codes_at_once_equal_each_code(model: LatentActionLM) -> None:
    features = model.features(tokens(2, 5))
    every = model.world_logits_of_all(features.final.flatten(0, 1))
    assert every.shape == (10, CODES, VOCABULARY)
    for code in range(CODES):
        expected = model.world_logits(features, torch.full((2, 5), code)).flatten(0, 1)
        torch.testing.assert_close(every[:, code], expected, rtol=0, atol=1e-4)


def test_straight_through_codes_reach_the_codebook(make_model: MakeModel) -> None:
    model = make_model()
    one_hot = torch.nn.functional.one_hot(torch.tensor([[2, 5]]), CODES).float()
    model.world_logits_from_codes(model.features(tokens(1, 2)).final, one_hot @ model.codebook).sum().backward()
    assert (model.codebook.grad.abs().sum(1) > 0).nonzero()[:, 0].tolist() == [2, 5]


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_actions": 0}, "num_actions=0 must be a positive"),
        ({"num_actions": 6.5}, r"num_actions=6\.5"),
        ({"merge_layers": -1}, "merge_layers=-1"),
        ({"policy_layers": 0, "inverse_dynamics_layers": 0}, "inverse_dynamics_layers=0.*policy_layers=0"),
        ({"merge_size": 0}, "merge_size=0"),
        ({"head": "linear"}, "head='linear' must be one of .*residual.*official"),
        ({"policy_reads": "early"}, "policy_reads='early'"),
        ({"inverse_dynamics_reads": "last"}, "inverse_dynamics_reads='last'"),
        ({"policy_layers": 1}, "inverse_dynamics_layers=2 and policy_layers=1 differ.*make them equal"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentActionConfig(**settings)


def test_all_bad_settings_at_once() -> None:
    with pytest.raises(ValueError, match=r"head='x'.*num_actions=-3"):
        LatentActionConfig(num_actions=-3, head="x")


def test_stacks_of_other_depths_are_fine_when_one_reads_final() -> None:
    assert LatentActionConfig(policy_layers=1, inverse_dynamics_reads="final").late_blocks == 1
    assert LatentActionConfig(policy_reads="final", inverse_dynamics_layers=3).late_blocks == 3
    assert LatentActionConfig(policy_reads="final", inverse_dynamics_reads="final").late_blocks == 0


def test_settings_that_do_not_fit_the_base(make_base: MakeBase, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"5 late blocks .* 4 blocks: choose at most 4"):
        LatentActionLM.from_base(make_base(), policy_layers=5, inverse_dynamics_layers=5)
    with pytest.raises(ValueError, match=r"no causal language model at .*nowhere"):
        LatentActionLM.from_base(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="level='tokens'"):
        LatentActionLM.from_base(make_base()).actor("tokens")


def test_parameter_counts_by_hand(model: LatentActionLM) -> None:
    counts = model.parameter_counts()
    assert counts["codebook"] == CODES * 32
    assert counts["merge"] == 2 * (2 * 64 * 64 + 64 * 32)
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    assert counts["policy"] == counts["inverse_dynamics"] == 2 * block + 32 + CODES * 32
    assert counts["base"] == 4 * block + 32 + 2 * VOCABULARY * 32
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


# -- saving and loading ------------------------------------------------------------------------------------------------


@pytest.fixture
def base_folder(make_base: MakeBase, tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "base"
    make_base().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(make_model: MakeModel, base_folder: Path) -> tuple[LatentActionLM, Path]:
    """A model on a base in a folder, and where it was saved by reference."""
    model = make_model(base=base_folder)
    return model, model.save_pretrained(base_folder.parent / "actions")


def assert_same(one: LatentActionLM, other: LatentActionLM) -> None:
    """Equal bit for bit: every tensor and the config; and what is generated."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [
        name for name in first if first[name].dtype != second[name].dtype or not torch.equal(first[name], second[name])
    ] == []
    assert one.config == other.config
    runs = [model.generate(tokens(2, 5), max_new_tokens=6, seed=3) for model in (one, other)]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    # Loaded tensors lie in the mapped file, where kernels may round otherwise than at aligned addresses.
    torch.testing.assert_close(runs[0].action_logp, runs[1].action_logp, rtol=0, atol=1e-6)


def test_round_trip_by_reference(saved: tuple[LatentActionLM, Path]) -> None:
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["latent_action_config.json", "latent_actions.safetensors"]
    loaded = LatentActionLM.from_pretrained(folder)
    assert_same(loaded, model)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.base.parameters())
    assert_same(LatentActionLM.from_pretrained(loaded.save_pretrained(folder.parent / "again")), model)


def test_round_trip_bundled(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    folder = model.save_pretrained(tmp_path / "bundled", bundle_base=True)
    shutil.move(folder, tmp_path / "elsewhere")
    assert_same(LatentActionLM.from_pretrained(tmp_path / "elsewhere"), model)


def test_round_trip_of_all_settings(make_model: MakeModel, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "num_actions": 5,
        "merge_layers": 1,
        "merge_size": 24,
        "policy_layers": 1,
        "inverse_dynamics_reads": "final",
    }
    model = make_model(head="official", inverse_dynamics_layers=3, **settings)
    loaded = LatentActionLM.from_pretrained(model.save_pretrained(tmp_path / "all", bundle_base=True))
    assert_same(loaded, model)
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(model.config)


def test_round_trip_without_inverse_dynamics(saved: tuple[LatentActionLM, Path], tmp_path: Path) -> None:
    model, folder = saved
    exported = LatentActionLM.from_pretrained(model.save_pretrained(folder.parent / "export", inverse_dynamics=False))
    assert exported.inverse_dynamics is None
    kept = {name: tensor for name, tensor in model.new_modules().items() if not name.startswith("inverse_dynamics.")}
    assert kept.keys() == exported.new_modules().keys()
    assert all(torch.equal(tensor, exported.new_modules()[name]) for name, tensor in kept.items())
    with pytest.raises(ValueError, match="exported without its inverse dynamics model"):
        exported.label_actions(tokens(1, 4))
    assert_same(LatentActionLM.from_pretrained(exported.save_pretrained(tmp_path / "twice")), exported)


def test_a_moved_run_folder_still_finds_its_base(saved: tuple[LatentActionLM, Path], tmp_path: Path) -> None:
    model, folder = saved
    shutil.move(folder.parent, tmp_path / "moved")
    assert base_path(tmp_path / "moved" / "actions") == str((tmp_path / "moved" / "base").resolve())
    assert_same(LatentActionLM.from_pretrained(tmp_path / "moved" / "actions"), model)


def test_a_moved_base_is_named_and_can_be_given(saved: tuple[LatentActionLM, Path], tmp_path: Path) -> None:
    model, folder = saved
    shutil.move(folder.parent / "base", tmp_path / "new-place")
    with pytest.raises(ValueError, match="where it is no longer"):
        LatentActionLM.from_pretrained(folder)
    assert_same(LatentActionLM.from_pretrained(folder, base=tmp_path / "new-place"), model)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "new-place")
    assert_same(LatentActionLM.from_pretrained(folder, base=lm), model)


def test_another_base_is_refused(saved: tuple[LatentActionLM, Path]) -> None:
    _, folder = saved
    weights = folder.parent / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] += 1e-3  # one number
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not the one .* was trained on"):
        LatentActionLM.from_pretrained(folder)


def test_another_precision_is_no_other_base(saved: tuple[LatentActionLM, Path]) -> None:
    loaded = LatentActionLM.from_pretrained(saved[1], dtype=torch.bfloat16)
    assert loaded.base.dtype == torch.bfloat16
    assert loaded.codebook.dtype == loaded.policy.head.weight.dtype == torch.float32
    assert int(loaded.cast_modules().generate(tokens(2, 5), max_new_tokens=4, seed=0, stop_token=-1).lengths.sum()) == 8


def test_a_loaded_base_without_a_folder_must_be_bundled(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bundle_base=True"):
        make_model().save_pretrained(tmp_path / "x")


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "latent_action_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "latent_actions.safetensors")
    change(tensors)
    save_file(tensors, folder / "latent_actions.safetensors")


def cut_weights(folder: Path) -> None:
    path = folder / "latent_actions.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "latent_action_config.json").write_text('{"format": 1,'),
            "cannot read .*latent_action_config.json",
        ),
        (lambda f: (f / "latent_action_config.json").write_text("[1]"), "has format None"),
        (lambda f: change_config(f, lambda c: c.update(format=99)), "has format 99, this version reads 1"),
        (lambda f: change_config(f, lambda c: c.pop("base")), "lacks base"),
        (lambda f: change_config(f, lambda c: c["latent_actions"].update(horizon=3)), "unknown settings: horizon"),
        (lambda f: change_config(f, lambda c: c["latent_actions"].update(num_actions=-1)), "num_actions=-1"),
        (
            lambda f: change_config(f, lambda c: c["latent_actions"].update(num_actions=9)),
            r"codebook is \(8, 32\), not \(9, 32\)",
        ),
        (lambda f: change_weights(f, lambda t: t.pop("codebook")), "codebook is missing"),
        (lambda f: change_weights(f, lambda t: t.update(extra=torch.zeros(1))), "extra is unknown"),
        (cut_weights, "cannot read .*latent_actions.safetensors"),
        (lambda f: (f / "latent_actions.safetensors").unlink(), "cannot read .*latent_actions.safetensors"),
        (lambda f: (f / "latent_action_config.json").unlink(), "no latent-action checkpoint in"),
        (shutil.rmtree, "no latent-action checkpoint in"),
    ],
    ids=[
        "json",
        "list",
        "format",
        "lacks",
        "unknown-setting",
        "bad-setting",
        "misfit",
        "missing",
        "unknown",
        "cut",
        "no-weights",
        "no-config",
        "no-folder",
    ],
)
def test_damage_is_named(saved: tuple[LatentActionLM, Path], damage: Callable[[Path], Any], message: str) -> None:
    damage(saved[1])
    with pytest.raises(ValueError, match=message):
        LatentActionLM.from_pretrained(saved[1])


def test_the_policy_alone(saved: tuple[LatentActionLM, Path]) -> None:
    model, folder = saved
    policy = load_policy(folder)
    expected = model.policy.state_dict()
    assert policy.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in policy.state_dict().items())
    late = model.features(tokens(2, 6)).late
    assert torch.equal(policy(late), model.policy(late))


def test_a_trained_policy_replaces_the_policy_alone(saved: tuple[LatentActionLM, Path]) -> None:
    model, folder = saved
    trained = {name: p.detach().numpy() + np.float32(0.5) for name, p in model.policy.named_parameters()}
    target = folder.parent / "deeper" / "trained"
    with_policy(folder, target, trained)
    loaded = LatentActionLM.from_pretrained(target)
    for name, tensor in model.new_modules().items():
        added = 0.5 if name.startswith("policy.") else 0.0
        assert torch.equal(loaded.new_modules()[name], tensor + added), name
    assert base_hash(loaded) == base_hash(model)
    assert world_hash(loaded) == world_hash(model)


def test_hashes_see_one_changed_number(make_model: MakeModel) -> None:
    model = make_model()
    world, base = world_hash(model), base_hash(model)
    with torch.no_grad():
        model.policy.head.weight[0, 0] += 1
        assert (world_hash(model), base_hash(model)) == (world, base)
        model.codebook[0, 0] += 1
        assert world_hash(model) != world
        model.base.lm.lm_head.weight[0, 0] += 1
        assert base_hash(model) != base


# -- 7. the published code ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> LatentActionLM:
    return LatentActionLM.from_pretrained(PARITY)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(PARITY / "expected.safetensors")


@torch.no_grad()
def test_published_tensors_are_reproduced(published: LatentActionLM, expected: dict[str, torch.Tensor]) -> None:
    ids = expected["input_ids"]
    features = published.features(ids)
    assert float((features.final - expected["hidden"]).abs().max()) < 1e-4
    assert float((published.policy_logits(features) - expected["policy_logits"]).abs().max()) < 1e-4
    at_position = published.inverse_dynamics_logits(features).argmax(-1)
    assert torch.equal(at_position, expected["idm_action_at_position"])
    # a_t is read at t + 1; the last position keeps its own.
    actions = torch.cat([published.label_actions(ids), at_position[:, -1:]], 1)
    assert float((published.world_logits(features, actions) - expected["idm_world_logits"]).abs().max()) < 1e-4


@pytest.mark.parametrize("code", [0, 4, 8, 12])
@torch.no_grad()
def test_published_world_logits_of_one_code(
    published: LatentActionLM, expected: dict[str, torch.Tensor], code: int
) -> None:
    ids = expected["input_ids"]
    logits = published.world_logits(published.features(ids), torch.full_like(ids, code))[:, -1:]
    assert float((logits - expected[f"world_logits_action_{code}"]).abs().max()) < 1e-4


def test_published_greedy_decode(published: LatentActionLM, expected: dict[str, torch.Tensor]) -> None:
    greedy = published.generate(expected["input_ids"][:, :4], max_new_tokens=12, temperature=0.0, stop_token=-1)
    assert torch.equal(greedy.actions, expected["greedy_actions"])
    assert torch.equal(torch.cat([expected["input_ids"][:, :4], greedy.tokens], 1), expected["greedy_tokens"])


def test_published_round_trip_in_our_format(published: LatentActionLM, tmp_path: Path) -> None:
    assert_same(
        LatentActionLM.from_pretrained(published.save_pretrained(tmp_path / "ours", bundle_base=True)), published
    )


def copy_published(tmp_path: Path, config: dict[str, Any], drop: str = "") -> Path:
    """The fixture with changed settings and one tensor left out."""
    saved = json.loads((PARITY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | config))
    tensors = load_file(PARITY / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != drop}, tmp_path / "model.safetensors")
    return tmp_path


def test_published_rope_settings_are_read(tmp_path: Path) -> None:
    """The real checkpoint is Llama-3.1's: base frequency 500000 with llama3 scaling, written the old way."""
    scaling = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    model = LatentActionLM.from_pretrained(copy_published(tmp_path, {"rope_theta": 500000.0, "rope_scaling": scaling}))
    for decoder in (model.base.decoder, model.policy.decoder, model.inverse_dynamics.decoder):
        parameters = decoder.config.rope_parameters
        assert parameters["rope_theta"] == 500000.0
        assert parameters["rope_type"] == "llama3"
        # The second frequency is theta^(-2/12), scaled or not by the llama3 rule: far from 10000^(-2/12) either way.
        assert float(decoder.rotary_emb.inv_freq[1]) < 0.9 * 10000 ** (-2 / 12)


@pytest.mark.parametrize(
    "name", ["model.policy_head.weight", "model.layers.1.mlp.up_proj.weight", "model.action_code_book.weight"]
)
def test_an_incomplete_published_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="missing"):
        LatentActionLM.from_pretrained(copy_published(tmp_path, {}, drop=name))


def test_a_published_checkpoint_without_safetensors_is_refused(tmp_path: Path) -> None:
    shutil.copy(PARITY / "config.json", tmp_path)
    with pytest.raises(ValueError, match="convert the published checkpoint to safetensors"):
        LatentActionLM.from_pretrained(tmp_path)


# -- other architectures -----------------------------------------------------------------------------------------------

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_LIKE = COMMON | {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2}
GPT2_LIKE: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
GPT2_LIKE |= {name: COMMON[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
# Windows of 5 tokens, so that prompts and rollouts here outgrow them; the last blocks attend otherwise than the first.
MIXED: dict[str, Any] = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "qwen2": ("Qwen2Config", LLAMA_LIKE),
    "qwen2-mixed": ("Qwen2Config", LLAMA_LIKE | MIXED | {"use_sliding_window": True}),
    "qwen3": ("Qwen3Config", LLAMA_LIKE | {"head_dim": 8}),
    "mistral": ("MistralConfig", LLAMA_LIKE | {"sliding_window": 5, "head_dim": 8}),
    "gemma": ("GemmaConfig", LLAMA_LIKE | {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        LLAMA_LIKE | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3TextConfig", LLAMA_LIKE | MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "granite": (
        "GraniteConfig",
        LLAMA_LIKE | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "cohere": ("CohereConfig", LLAMA_LIKE),
    "smollm3": ("SmolLM3Config", LLAMA_LIKE),
    "gpt2": ("GPT2Config", GPT2_LIKE),
    "gptj": ("GPTJConfig", GPT2_LIKE | {"rotary_dim": 4}),
    "gpt-neox": ("GPTNeoXConfig", COMMON | {"intermediate_size": 64, "initializer_range": 0.2}),
    "opt": ("OPTConfig", COMMON | {"word_embed_proj_dim": 32, "ffn_dim": 64, "init_std": 0.2}),
    "phi": ("PhiConfig", LLAMA_LIKE),
    "phi3": ("Phi3Config", LLAMA_LIKE),
    "llama-tied": ("LlamaConfig", LLAMA_LIKE | {"tie_word_embeddings": True}),
    "falcon": ("FalconConfig", COMMON | {"initializer_range": 0.2}),
    "bloom": ("BloomConfig", GPT2_LIKE | {"hidden_size": 32}),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_lm(request: pytest.FixtureRequest) -> PreTrainedModel:
    name, settings = ARCHITECTURES[request.param]
    config = getattr(transformers, name)(
        **{key: value for key, value in settings.items() if key != "n_positions" or name != "BloomConfig"}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@torch.no_grad()
def test_any_architecture_starts_as_itself(any_lm: PreTrainedModel) -> None:
    """World model and token-level policy equal the base bit for bit; a late stack equals its last blocks."""
    lm, ids = copy.deepcopy(any_lm), tokens(3, 12)
    expected = lm(ids).logits
    model = LatentActionLM.from_base(lm, num_actions=CODES, policy_layers=3, inverse_dynamics_layers=3, seed=1)
    features = model.features(ids)
    for code in range(CODES):
        assert torch.equal(model.world_logits(features, torch.full_like(ids, code)), expected), code
    assert torch.equal(model.policy.hidden(features.late), features.final)
    base, policy = token_policy(copy.deepcopy(any_lm), "last_blocks", 3)
    base.drop_late_blocks()
    assert torch.equal(policy.head(policy.hidden(base.features(ids).late)), expected)
    base, policy = token_policy(copy.deepcopy(any_lm), "added_blocks", 2)
    assert torch.equal(policy.head(policy.hidden(base.features(ids).final)), expected)


@torch.no_grad()
def test_any_architecture_sees_nothing_that_it_must_not(
    any_lm: PreTrainedModel, randomise: Callable[[LatentActionLM], LatentActionLM]
) -> None:
    """Policy and world model at t depend on tokens up to t, a_t on those up to t + 1; padding on the right changes
    nothing."""
    model = LatentActionLM.from_base(copy.deepcopy(any_lm), num_actions=CODES, seed=1).eval()
    randomise(model)
    ids, seen = tokens(2, 12), 7
    other = torch.cat([ids[:, :seen], (ids[:, seen:] + 1) % VOCABULARY], 1)
    codes = torch.arange(12).remainder(CODES).expand(2, -1)
    left, right = (model.features(rows) for rows in (ids, other))
    for of in (
        model.policy_logits,
        lambda features: model.world_logits(features, codes),
        model.inverse_dynamics_logits,
    ):
        torch.testing.assert_close(of(left)[:, :seen], of(right)[:, :seen], rtol=0, atol=1e-4)
    assert torch.equal(model.label_actions(ids)[:, : seen - 1], model.label_actions(other)[:, : seen - 1])
    assert not torch.allclose(model.policy_logits(left)[:, seen], model.policy_logits(right)[:, seen], atol=1e-4)
    padded, mask = torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    whole = model.features(padded, mask)
    torch.testing.assert_close(model.policy_logits(whole, mask)[:, :12], model.policy_logits(left), rtol=0, atol=1e-4)


@torch.no_grad()
def test_any_architecture_decodes_as_its_full_forward(
    any_lm: PreTrainedModel, randomise: Callable[[LatentActionLM], LatentActionLM]
) -> None:
    """Left padded, repeated, squeezed, for longer than any attention window here."""
    model = LatentActionLM.from_base(copy.deepcopy(any_lm), num_actions=CODES, seed=1).eval()
    randomise(model)
    rows = [tokens(1, length, length)[0] for length in (12, 8, 3)]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, 12 - len(row) :], mask[index, 12 - len(row) :] = row, 1
    limits = [9, 2, 3, 9, 1, 8]
    generation = model.generate(
        ids, mask, max_new_tokens=limits, seed=0, stop_token=-1, repeats=2, return_features=True
    )
    for index, limit in enumerate(limits):
        row = rows[index // 2]
        whole, positions = (
            torch.cat([row, generation.tokens[index, :limit]])[None],
            slice(len(row) - 1, len(row) - 1 + limit),
        )
        features, actions = model.features(whole), torch.zeros_like(whole)
        actions[0, positions] = generation.actions[index, :limit]
        log_probs = torch.log_softmax(model.policy_logits(features), -1)[0, positions].gather(
            -1, actions[0, positions, None]
        )[:, 0]
        torch.testing.assert_close(log_probs, generation.action_logp[index, :limit], rtol=0, atol=1e-3)
        assert torch.equal(
            model.world_logits(features, actions)[0, positions].argmax(-1), generation.tokens[index, :limit]
        )
        torch.testing.assert_close(generation.features[index], features.late[0, :-1], rtol=0, atol=1e-3)


def test_any_architecture_is_saved_bundled_and_loaded(any_lm: PreTrainedModel, tmp_path: Path) -> None:
    model = LatentActionLM.from_base(copy.deepcopy(any_lm), num_actions=CODES, seed=1).eval()
    model.save_pretrained(tmp_path / "m", bundle_base=True)
    assert_same(LatentActionLM.from_pretrained(tmp_path / "m"), model)
    policy = load_policy(tmp_path / "m")
    assert all(torch.equal(tensor, model.policy.state_dict()[name]) for name, tensor in policy.state_dict().items())


def test_a_base_in_a_pickle_is_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    base.config.save_pretrained(tmp_path)
    torch.save(base.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError,
        match=r"pytorch_model.bin only, which are pickles and not read; take the model.s "
        r"safetensors",
    ):
        LatentActionLM.from_base(tmp_path)


def test_a_base_that_projects_its_embeddings_is_refused() -> None:
    """A limitation: OPT-350m's head is narrower than its blocks."""
    config = transformers.OPTConfig(**COMMON, word_embed_proj_dim=16, ffn_dim=64)
    with pytest.raises(ValueError, match=r"OPTForCausalLM .*\(32\), but has one of width 16"):
        LatentActionLM.from_base(AutoModelForCausalLM.from_config(config))


def test_the_published_head_is_for_llama_like_bases() -> None:
    """A limitation: the published formula needs the final norm where Llama has it."""
    with pytest.raises(ValueError, match=r"head='official' .* not GPT2LMHeadModel: use 'residual'"):
        LatentActionLM.from_base(
            AutoModelForCausalLM.from_config(transformers.GPT2Config(**GPT2_LIKE)), head="official"
        )


def test_a_stack_of_no_blocks_is_refused(base: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="0 blocks asked for"):
        DecoderStack(base.get_decoder(), 0, 3)
