"""Any base LM works or is refused by name with the reason, from its files and when loaded alike.

Oracles: transformers' own ``generate`` and full passes; the published code's outputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from base_families import FAMILIES, OWN, TOLERANCE, conformance, tiny_model, tried  # noqa: E402

from latent_control import LatentActionLM  # noqa: E402
from latent_control.bases.loading import BASE, examine  # noqa: E402

PARITY = ROOT / "tests" / "fixtures" / "official_parity"
WORK = ("deepseek_v3", "phimoe", "ctrl")
OTHERWISE: dict[str, dict[str, Any]] = {
    "hyperclovax": {"logits_scaling": 4.0},  # which multiplies here, and divides in Granite
    "mpt": {"logit_scale": 0.5},  # which nothing reads
    "phimoe": {"attention_bias": True, "lm_head_bias": True},  # whose routers' noise is a threshold, too
    "llama4_text": {"attn_temperature_tuning": True, "floor_scale": 24, "no_rope_layers": [0, 0, 0, 0]},
    "doge": {"keep_window_size": 22},
}
"""Families as their published models are set up, not as by default."""
REFUSED = {
    "qwen3_next": "recurrent or convolutional state",
    "gemma3n_text": "reads the token ids again",
    "openai-gpt": "not called with past_key_values",
    "bart": "encoder-decoder",
    "modernbert-decoder": r"more to the last states than one language head \(lm_head.dense.weight\)",
}


@pytest.mark.parametrize("family", WORK)
def test_a_family_decodes_as_transformers_does(family: str, tmp_path: Path) -> None:
    """Mixtures of experts after dense blocks, noise on routers, scaled embeddings."""
    found = tried(family, tmp_path)
    assert (found.result, found.why) == ("works", "")
    assert len(found.gaps) == 7


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    refused_with_the_reason(family, REFUSED[family], tmp_path)


def refused_with_the_reason(family: str, reason: str, tmp_path: Path) -> None:
    """From its files and when loaded alike."""
    lm = tiny_model(family)
    lm.save_pretrained(tmp_path)
    (problem,) = examine(tmp_path, BASE, trust_remote_code=False).problems
    with pytest.raises(ValueError, match=rf"{type(lm).__name__} is not supported: .*{reason}.*; take a "):
        LatentActionLM.from_base(tmp_path)
    with pytest.raises(ValueError) as of_a_loaded_one:
        LatentActionLM.from_base(lm)
    # AutoModelForCausalLM makes a decoder of an encoder-decoder: the class is another one.
    assert problem.partition(": ")[2].partition(" ")[2] == str(of_a_loaded_one.value).partition(" ")[2]


@pytest.mark.parametrize("family", OTHERWISE)
def test_settings_that_change_what_a_family_does_are_heeded(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OWN, family, OTHERWISE[family])
    found = tried(family, tmp_path)
    assert (found.result, found.why) == ("works", "")


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "attend to later tokens"),
        ("llama", {"is_causal": False}, "attend to later tokens"),
        ("doge", {"is_moe": True}, "routers mix the scores of different tokens"),
    ],
)
def test_what_sees_later_tokens_is_refused(
    family: str, settings: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that embed texts are saved as causal ones, too."""
    monkeypatch.setitem(OWN, family, settings)
    refused_with_the_reason(family, reason, tmp_path)


def test_what_is_done_to_logits_is_followed_or_refused() -> None:
    lm = tiny_model("llama")
    wrapped = type("OwnLlama", (type(lm),), {})

    def with_forward(forward: Any) -> nn.Module:
        made = wrapped(lm.config).eval()
        wrapped.forward = forward
        return made

    def squared(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = type(lm).forward(self, *args, **kwargs)
        out.logits = out.logits**2
        return out

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs).hidden_states[-1]

    for forward, reason in ((squared, "else to its logits than to scale"), (other, "cannot be followed \\(TypeError")):
        with pytest.raises(ValueError, match=f"OwnLlama is not supported: it.*{reason}"):
            LatentActionLM.from_base(with_forward(forward))


@pytest.mark.parametrize(("family", "steady"), [("llama4_text", 23), ("doge", 22)])
def test_rows_that_would_depend_on_their_company_are_refused(
    family: str, steady: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OWN, family, OTHERWISE[family])
    model = LatentActionLM.from_base(tiny_model(family), num_actions=5, seed=1)
    ids = torch.arange(3, 3 + steady)[None]
    model.features(ids)
    with pytest.raises(ValueError, match=f"beyond {steady}: keep prompts and responses within that"):
        model.features(torch.cat([ids, ids[:, :1]], 1))
    with pytest.raises(ValueError, match=f"beyond {steady}"):
        model.generate(ids[:, :12], max_new_tokens=steady - 11)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_or_is_refused(family: str, tmp_path: Path) -> None:
    found = tried(family, tmp_path)
    if found.result == "not tried":
        pytest.skip(found.why)
    assert found.result in ("works", "refused"), found.why


def test_the_page_lists_every_family() -> None:
    """docs/base-models.md is of the transformers installed here."""
    page = (ROOT / "docs" / "base-models.md").read_text()
    listed = {name.strip(" .|") for line in page.splitlines() for name in line.partition("): ")[2].split(",")}
    listed |= {name.strip() for line in page.splitlines() for name in line.strip("|").split("|")[0].split(",")}
    assert set(FAMILIES) <= listed


@torch.no_grad()
def test_a_new_model_draws_nothing_at_random_in_its_passes() -> None:
    """PhiMoE's routers add noise in training: neither after from_base nor in a stack that trains."""
    lm = tiny_model("phimoe").train()
    model = LatentActionLM.from_base(lm, num_actions=5, seed=1)
    assert not any(module.training for module in model.modules())
    ids = torch.arange(3, 15)[None]
    states = model.features(ids).late
    assert states is not None
    model.policy.train()
    assert torch.equal(model.policy(states), model.policy(states))


@pytest.mark.parametrize("blocks", [1, 2])
def test_defaults_fit_a_base_of_few_blocks(blocks: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=blocks, num_attention_heads=4,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        lm = transformers.LlamaForCausalLM(config).eval()
    model = LatentActionLM.from_base(lm, num_actions=5, seed=1)
    assert (model.config.policy_layers, model.config.inverse_dynamics_layers) == (blocks, blocks)
    assert max(conformance(lm, model).values()) < TOLERANCE
    model.base.drop_late_blocks()  # nothing lies below them, so they stay
    assert model.features(torch.arange(3, 15)[None]).final is not None


def published(folder: Path, base: int, action: int, policy: int, merge: int) -> Path:
    """The published fixture with other numbers of blocks, each a scaled copy of one that is there."""
    saved = json.loads((PARITY / "config.json").read_text())
    counts = {"num_action_layer": action, "num_policy_layer": policy, "num_dyna_layer": merge}
    (folder / "config.json").write_text(json.dumps(saved | {"num_hidden_layers": base} | counts))
    tensors = load_file(PARITY / "model.safetensors")
    stacks = {"layers": base, "action_layers": action, "policy_layers": policy, "action_merge_layers": merge}
    for stack, count in stacks.items():
        prefix = f"model.{stack}."
        old = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        there = 1 + max(int(name.partition(".")[0]) for name in old)
        for number in range(count):
            for name, tensor in old.items():
                source, _, rest = name.partition(".")
                if int(source) == number % there:
                    tensors[f"{prefix}{number}.{rest}"] = tensor * (1 + number // there)
    save_file(tensors, folder / "model.safetensors")
    return folder


class Reference:
    """The published code's formulas written out: blocks of transformers' Llama over hidden states, norm, head."""

    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / "model.safetensors")
        known = json.loads((folder / "config.json").read_text())
        self.counts = known
        fields = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        self.config = transformers.LlamaConfig(
            **{name: known[name] for name in (*fields, "rms_norm_eps", "head_dim", "max_position_embeddings")},
            attn_implementation="eager",
        )

    def stack(self, blocks: str, norm: str, count: int, states: torch.Tensor) -> torch.Tensor:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        length = states.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        places = LlamaRotaryEmbedding(self.config)(states, torch.arange(length)[None])
        for number in range(count):
            block = LlamaDecoderLayer(self.config, number).eval()
            prefix = f"model.{blocks}.{number}."
            block.load_state_dict(
                {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
            )
            out = block(states, attention_mask=mask, position_embeddings=places)
            states = out[0] if isinstance(out, tuple) else out
        return self.norm(norm, states)

    def norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        weight = self.tensors[f"model.{name}.weight"]
        return nn.functional.rms_norm(states, weight.shape, weight, self.config.rms_norm_eps)

    def run(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.stack(
            "layers", "norm", self.counts["num_hidden_layers"], self.tensors["model.embed_tokens.weight"][ids]
        )
        action = self.stack("action_layers", "action_norm", self.counts["num_action_layer"], hidden)
        policy = self.stack("policy_layers", "policy_norm", self.counts["num_policy_layer"], hidden)
        codes = (action @ self.tensors["model.action_head.weight"].T).argmax(-1)
        taken = torch.cat([codes[:, 1:], codes[:, -1:]], 1)
        vectors, state = self.tensors["model.action_code_book.weight"].T[taken], hidden
        for number in range(self.counts["num_dyna_layer"]):
            gate, up, down = (
                self.tensors[f"model.action_merge_layers.{number}.{name}_proj.weight"]
                for name in ("gate", "up", "down")
            )
            both = torch.cat([state, vectors], -1)
            state = state + (nn.functional.silu(both @ gate.T) * (both @ up.T)) @ down.T
        merged = self.norm("norm", state) - hidden
        return {
            "hidden": hidden,
            "policy_logits": policy @ self.tensors["model.policy_head.weight"].T,
            "idm_action_at_position": codes,
            "idm_world_logits": merged @ self.tensors["lm_head.weight"].T,
        }


@pytest.mark.parametrize(("base", "action", "policy", "merge"), [(2, 1, 2, 1), (1, 3, 2, 2), (1, 1, 4, 1)])
@torch.no_grad()
def test_a_published_checkpoint_with_stacks_deeper_than_its_base(
    base: int, action: int, policy: int, merge: int, tmp_path: Path
) -> None:
    folder = published(tmp_path, base, action, policy, merge)
    ids = load_file(PARITY / "expected.safetensors")["input_ids"]
    wanted = Reference(folder).run(ids)
    model = LatentActionLM.from_pretrained(folder)
    features = model.features(ids)
    assert features.final is not None
    torch.testing.assert_close(features.final, wanted["hidden"], rtol=0, atol=1e-4)
    torch.testing.assert_close(model.policy_logits(features), wanted["policy_logits"], rtol=0, atol=1e-4)
    codes = model.inverse_dynamics_logits(features).argmax(-1)
    assert torch.equal(codes, wanted["idm_action_at_position"])
    actions = torch.cat([model.label_actions(ids), codes[:, -1:]], 1)
    torch.testing.assert_close(model.world_logits(features, actions), wanted["idm_world_logits"], rtol=0, atol=1e-4)
    out = model.generate(ids[:, :4], max_new_tokens=12, temperature=0.0, stop_token=-1)
    whole = torch.cat([ids[:, :4], out.tokens], 1)
    assert torch.equal(Reference(folder).run(whole)["policy_logits"].argmax(-1)[:, 3:-1], out.actions)
    assert torch.equal(LatentActionLM.from_pretrained(model.save_pretrained(tmp_path / "ours", bundle_base=True))
                       .policy_logits(features), model.policy_logits(features))  # fmt: skip


def test_a_published_checkpoint_as_others_write_it(tmp_path: Path) -> None:
    """Buffers of older versions in every stack; a number or a base that its config does not name."""
    folder = published(tmp_path, 2, 2, 2, 2)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    ids = load_file(PARITY / "expected.safetensors")["input_ids"]
    wanted = LatentActionLM.from_pretrained(folder)
    stacks = ("layers", "action_layers", "policy_layers")
    save_file(
        tensors | {f"model.{stack}.0.self_attn.rotary_emb.inv_freq": torch.ones(6) for stack in stacks},
        folder / "model.safetensors",
    )
    found = LatentActionLM.from_pretrained(folder)
    assert torch.equal(found.policy_logits(found.features(ids)), wanted.policy_logits(wanted.features(ids)))
    for name in ("num_action_layer", "num_policy_layer", "num_dyna_layer"):
        (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != name}))
        with pytest.raises(ValueError, match=f"config.json has num_code, but no {name}"):
            LatentActionLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "cola"}))
    with pytest.raises(ValueError, match=r"model_type 'cola' is none of transformers'; name its base's \(llama\)"):
        LatentActionLM.from_pretrained(folder)


@torch.no_grad()
def test_the_written_out_formulas_are_the_published_codes() -> None:
    expected = load_file(PARITY / "expected.safetensors")
    for name, found in Reference(PARITY).run(expected["input_ids"]).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4)
