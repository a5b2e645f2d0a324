"""A model's folder that does not hold the model: refused from the files alone by ``config check`` and by every loader,
never filled up."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaModel
from typer.testing import CliRunner

from configs.schema import RunConfig
from latent_control import LatentActionLM
from latent_control.base_lm import load_base
from latent_control.bases import loading
from latent_control.bases.loading import BASE, ENCODER, REWARD_MODEL, examine, load_model
from latent_control.bases.weight_files import absent_by_number, read_shapes
from latent_control.preference import load_classifier, require_reward_model
from latent_control.pretrained import load_policy
from latent_control.token_policy import token_policy
from pipeline.cli.main import app
from pipeline.preflight.check import check
from pipeline.stages import embedding

pytest_plugins = ("rl_fixtures",)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4\n"
Damage = Callable[[Path], Any]


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], name: str = WEIGHTS) -> None:
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def drop(folder: Path, *names: str) -> None:
    change(folder, lambda tensors: [tensors.pop(name) for name in names])


def settings(folder: Path, name: str = "config.json", **changed: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def cut(path: Path, to: int) -> None:
    path.write_bytes(path.read_bytes()[:to])


def header(folder: Path, text: bytes, length: int | None = None) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 16)


def overlapping(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header(folder, json.dumps({"a": entry, "b": entry | {"data_offsets": [4, 12]}}).encode())


def shards(folder: Path) -> list[str]:
    """Cut the weights into several files; their names."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="8KB")
    (folder / WEIGHTS).unlink()
    return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def headless(folder: Path) -> None:
    LlamaModel.from_pretrained(folder).save_pretrained(folder)


def linked(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "gone")


def longer_tokenizer(folder: Path) -> None:
    said = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    vocabulary |= {"word-too-many": max(vocabulary.values()) + 1}
    (folder / "tokenizer.json").write_text(json.dumps(said))


DAMAGE: dict[str, tuple[Damage, str]] = {
    "lfs": (lambda f: (f / WEIGHTS).write_text(POINTER), r"model.safetensors is a Git LFS pointer.* git lfs pull"),
    "cut": (
        lambda f: cut(f / WEIGHTS, -100),
        r"model.safetensors .*should have \d+ bytes, but has \d+\); copy it again",
    ),
    "cut-in-header": (lambda f: cut(f / WEIGHTS, 500), r"its header should have \d+ bytes, but the file has 500"),
    "cut-to-nothing": (lambda f: cut(f / WEIGHTS, 0), r"model.safetensors is empty; copy"),
    "cut-to-five": (lambda f: cut(f / WEIGHTS, 5), r"its header should have \d+ bytes, but the file has 5"),
    "header-too-long": (lambda f: header(f, b"{}", 2**63), r"its header should have 9223372036854775808 bytes"),
    "header-no-json": (lambda f: header(f, b"{not json"), r"is not a whole safetensors file \(.*\); copy it again"),
    "header-deep": (lambda f: header(f, b"[" * 100_000), r"is not a whole safetensors file \(.*\); copy it again"),
    "overlap": (overlapping, r"is not a whole safetensors file \(.*\); copy it again"),
    "no-weights": (lambda f: (f / WEIGHTS).unlink(), r"has no weights: neither model.safetensors nor"),
    "dangling-link": (linked, r"model.safetensors is a link to nothing"),
    "folder-for-file": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), r"model.safetensors is not a file"),
    "pickle": (pickled, r"pytorch_model.bin only, which are pickles and not read; take the model's safetensors"),
    "variant": (
        lambda f: (f / WEIGHTS).rename(f / "model.fp16.safetensors"),
        r"but model.fp16.safetensors; .*give it "
        r"the usual name",
    ),
    "no-shard": (
        lambda f: (f / shards(f)[1]).unlink(),
        r"lacks 1 of the \d+ files that its .*index.json names: model-00002-of-",
    ),
    "shard-lfs": (lambda f: (f / shards(f)[1]).write_text(POINTER), r"model-00002-of-.* is a Git LFS pointer"),
    "shard-cut": (lambda f: cut(f / shards(f)[-1], -4), r"model-0.*should have \d+ bytes"),
    "shard-lacks": (
        lambda f: change(f, lambda t: t.popitem(), shards(f)[2]),
        r"index.json lacks 1 of the model's 21 "
        r"tensors",
    ),
    "index-no-json": (lambda f: (shards(f), (f / INDEX).write_text("{")), r"is not an index of safetensors files"),
    "index-outside": (
        lambda f: (shards(f), settings(f, INDEX, weight_map={"a": "../a.safetensors"})),
        r"not a safetensors file in the same",
    ),
    "index-empty": (lambda f: (shards(f), settings(f, INDEX, weight_map={})), r"weight_map names no files"),
    "missing": (
        lambda f: drop(
            f, "model.norm.weight", *(f"model.layers.1.mlp.{n}_proj.weight" for n in ("up", "down", "gate"))
        ),
        r"model.safetensors lacks 4 of the model's 21 tensors: model.layers.1.mlp.down_proj.weight, .*gate.*up.* and "
        r"1 more; copy",
    ),
    "unexpected": (
        lambda f: change(f, lambda t: t.update(v_head=torch.ones(2))),
        r"has 1 tensors that .*: v_head; "
        r"take config",
    ),
    "shape": (
        lambda f: change(f, lambda t: t.update({"model.norm.weight": torch.ones(7)})),
        r"has 1 tensors of another shape than config.json says: model.norm.weight is \[7\], not \[32\]; take",
    ),
    "other-config": (lambda f: settings(f, num_hidden_layers=3), r"lacks 9 of the model's 30 tensors"),
    "fewer-blocks": (
        lambda f: settings(f, num_hidden_layers=1),
        r"has 9 tensors that the LlamaForCausalLM of its "
        r"config.json has not",
    ),
    "headless": (
        headless,
        r"lacks 1 .*lm_head.weight; it was saved without its head: save it with "
        r"AutoModelForCausalLM",
    ),
    "tokenizer-larger": (
        longer_tokenizer,
        r"tokenizer.json has 1 tokens beyond the \d+ rows .*: word-too-many; take the tokenizer",
    ),
    "tokenizer-config-larger": (
        lambda f: settings(f, "tokenizer_config.json", mask_token="[HIDE]", additional_special_tokens=["<x>", "<y>"]),
        r"tokenizer.json has 3 tokens beyond the \d+ rows .*: <x>, <y>, \[HIDE\]|has 3 tokens beyond",
    ),
    "tokenizer-config-lists-more": (
        lambda f: settings(f, "tokenizer_config.json", added_tokens_decoder={"99999": {"content": "<far>"}}),
        r"has 1 tokens beyond the \d+ rows .*: <far>; take the tokenizer",
    ),
    "twice": (
        lambda f: change(f, lambda t: t.update({"model.model.norm.weight": torch.full((32,), 9.0)})),
        r"has 1 tensors twice, with and without 'model.': model.norm.weight; save the model again",
    ),
    "config-of-no-heads": (
        lambda f: settings(f, num_attention_heads=0),
        r"config.json of .* describes no model: integer",
    ),
    "config-of-words": (lambda f: settings(f, hidden_size="32"), r"describes no model: .*hidden_size"),
    "tokenizer-lfs": (lambda f: (f / "tokenizer.json").write_text(POINTER), r"tokenizer.json is a Git LFS pointer"),
    "adapter-only": (
        lambda f: (
            (f / WEIGHTS).rename(f / "adapter_model.safetensors").with_name("adapter_config.json").write_text("{}")
        ),
        r"weights of an adapter only; remove config.json",
    ),
    "adapter-beside": (lambda f: (f / "adapter_config.json").write_text("{}"), r"holds a whole model and an adapter"),
}


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def errors_of(base: Path, **sections: Any) -> list[str]:
    actions = {"policy_layers": 1, "inverse_dynamics_layers": 1}
    return check(RunConfig(base={"model": str(base)}, actions=actions, rollout={"num_workers": 1}, **sections)).errors


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_broken_base_is_refused_from_its_files(
    folder: Path, damage: Damage, message: str, request: pytest.FixtureRequest
) -> None:
    damage(folder)
    state = torch.get_rng_state()
    request.getfixturevalue("no_load")
    with pytest.raises(ValueError, match=message) as refusal:
        LatentActionLM.from_base(folder)
    assert str(folder) in str(refusal.value) and torch.equal(state, torch.get_rng_state())
    (found,) = (error for error in errors_of(folder) if not error.startswith("actions."))
    assert found.startswith("base.model: ") and str(folder) in found
    assert re.search(message, found)


def test_the_whole_base_passes(folder: Path) -> None:
    assert errors_of(folder) == [] and examine(folder, BASE, trust_remote_code=False).unjudged is None
    shards(folder)
    assert errors_of(folder) == [] and LatentActionLM.from_base(folder, policy_layers=1, inverse_dynamics_layers=1)


@pytest.mark.parametrize("name", ["lfs", "missing", "no-shard"])
def test_the_command_line_refuses_it(folder: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    config = tmp_path / "config.yaml"
    config.write_text(f"base: {{model: {folder}}}\nactions: {{policy_layers: 1, inverse_dynamics_layers: 1}}\n")
    done = CliRunner().invoke(app, ["config", "check", str(config), "--json"])
    said = " ".join(done.output.replace("\\n", " ").split())
    assert done.exit_code == 2, done.output
    assert re.search(message, said)


def test_names_from_a_file_cannot_steer_the_terminal(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"\x1b[2Jgone": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"\\x1b\[2Jgone"):
        load_base(folder)


def test_what_was_not_seen_in_the_files_is_seen_after_the_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a model that the loader downloads."""
    drop(folder, "model.norm.weight")
    monkeypatch.setattr(loading, "examine", lambda *_, **__: loading.FolderVerdict([], None, None))
    with pytest.raises(ValueError, match=r"lacks 1 of the model's 21 tensors: model.norm.weight; copy"):
        LatentActionLM.from_base(folder)


SMALL: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 64}
LIKE_LLAMA = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2}
MIXED = LIKE_LLAMA | {"num_experts_per_tok": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MASK = torch.ones(1, 1, 64, 64, dtype=torch.bool)
INTACT: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "llama": (
        "Llama",
        LIKE_LLAMA,
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)},
    ),
    "llama-tied": ("Llama", LIKE_LLAMA | {"tie_word_embeddings": True}, {}),
    "qwen2": ("Qwen2", LIKE_LLAMA | {"tie_word_embeddings": True}, {}),
    "qwen3": ("Qwen3", LIKE_LLAMA | {"head_dim": 8}, {}),
    "mixtral": ("Mixtral", MIXED | {"num_local_experts": 4}, {}),
    "qwen2-moe": (
        "Qwen2Moe",
        MIXED | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        {},
    ),
    "gemma": ("Gemma", LIKE_LLAMA | {"head_dim": 8}, {}),
    "gemma2": ("Gemma2", LIKE_LLAMA | {"head_dim": 8}, {}),
    "phi": ("Phi", SMALL | {"intermediate_size": 64}, {}),
    "phi3": ("Phi3", LIKE_LLAMA, {}),
    "opt": ("OPT", SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}, {}),
    "bloom": ("Bloom", SMALL, {}),
    "falcon": ("Falcon", SMALL, {}),
    "gpt2": (
        "GPT2",
        SMALL,
        {
            f"transformer.h.{i}.attn.{name}": mask
            for i in range(2)
            for name, mask in (("bias", MASK), ("masked_bias", torch.tensor(-1e4)))
        },
    ),
    "gptj": (
        "GPTJ",
        SMALL | {"rotary_dim": 4},
        {"transformer.h.0.attn.bias": MASK, "transformer.h.0.attn.masked_bias": torch.ones(())},
    ),
    "gpt_neo": (
        "GPTNeo",
        SMALL | {"attention_types": [[["global"], 2]]},
        {"transformer.h.1.attn.attention.bias": MASK},
    ),
    "gpt_neox": (
        "GPTNeoX",
        SMALL | {"intermediate_size": 64},
        {"gpt_neox.layers.0.attention.bias": MASK, "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1)},
    ),
}


def make(folder: Path, name: str, **changed: Any) -> Path:
    """An untrained model of an architecture, with the buffers that its older versions saved."""
    kind, shape, buffers = INTACT[name]
    wanted = SPECIAL | shape | changed
    known = getattr(transformers, f"{kind}Config")()
    config = type(known)(**{key: value for key, value in wanted.items() if hasattr(known, key)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    change(folder, lambda tensors: tensors.update({name: tensor.clone() for name, tensor in buffers.items()}))
    return folder


@pytest.mark.parametrize("name", INTACT)
def test_what_an_architecture_leaves_out_passes_and_what_it_needs_does_not(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "base", name)
    assert examine(folder, BASE, trust_remote_code=False)[:2] == ([], None)
    assert load_base(folder) is not None
    tensors = load_file(folder / WEIGHTS)
    needed = sorted(
        key for key in tensors if key not in INTACT[name][2] and tensors[key].ndim == 2 and "head" not in key
    )
    drop(folder, needed[len(needed) // 2])
    (problem,) = examine(folder, BASE, trust_remote_code=False).problems
    assert "lacks" in problem or "of another shape" in problem or "missing: " in problem


def test_names_without_the_prefix_of_the_head_s_model_pass(tmp_path: Path) -> None:
    """As in the first GPT-2 files; the head is tied."""
    folder = make(tmp_path / "base", "gpt2")
    whole = load_base(folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    assert examine(folder, BASE, trust_remote_code=False)[:2] == ([], None)
    assert torch.equal(load_base(folder).transformer.h[1].mlp.c_fc.weight, whole.transformer.h[1].mlp.c_fc.weight)


def test_a_missing_part_of_an_expert_is_named_as_in_the_file(tmp_path: Path) -> None:
    folder = make(tmp_path / "base", "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    drop(folder, name)
    with pytest.raises(ValueError, match=f"joined when loading do not fit each other; missing: {name}; copy"):
        load_base(folder)
    assert absent_by_number(["a.0.b.1", "a.1.b.0", "a.1.b.1", "c"]) == ["a.0.b.0"]
    # 40 ** 40 names are not made
    assert absent_by_number([".".join(map(str, range(i, i + 40))) for i in range(40)]) == []


def test_quantised_models_and_models_with_code_are_let_pass_with_a_word(folder: Path) -> None:
    settings(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    drop(folder, "model.norm.weight")
    problems, unjudged, rows = examine(folder, BASE, trust_remote_code=False)
    assert not problems and rows and unjudged is not None and "it is quantised" in unjudged
    cut(folder / WEIGHTS, -4)  # whole files are asked for all the same
    assert examine(folder, BASE, trust_remote_code=False).problems


def test_tokens_for_pictures_may_lie_beyond_a_text_model_s_embedding(folder: Path) -> None:
    longer_tokenizer(folder)
    settings(folder, "tokenizer_config.json", image_token="word-too-many")
    assert examine(folder, BASE, trust_remote_code=False).problems == []


def test_a_hub_id_is_judged_by_what_the_cache_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "not all, on this machine yet" in str(examine("some-one/no-model", BASE, trust_remote_code=False).unjudged)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_: str(folder / "config.json"))
    assert examine("some-one/model", BASE, trust_remote_code=False)[:2] == ([], None)
    cut(folder / WEIGHTS, -4)
    assert "should have" in examine("some-one/model", BASE, trust_remote_code=False).problems[0]
    (folder / WEIGHTS).unlink()
    assert "not all, on this machine yet" in str(examine("some-one/model", BASE, trust_remote_code=False).unjudged)
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", True)
    assert "has no weights" in examine("some-one/model", BASE, trust_remote_code=False).problems[0]


# -- reward models, encoders, our own checkpoints ----------------------------------------------------------------------


@pytest.fixture
def classifier(folder: Path) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.save_pretrained(folder)
    return folder


def test_a_reward_model_without_its_head_is_trained_but_not_hosted(classifier: Path, tiny_base: Path) -> None:
    require_reward_model(str(classifier))
    load_classifier(str(classifier))
    drop(classifier, "score.weight")
    for refused in (require_reward_model, load_classifier):
        with pytest.raises(ValueError, match=r"lacks 1 of the model's 21 tensors: score.weight"):
            refused(str(classifier))
    load_classifier(str(classifier), new_head=True)
    load_classifier(str(tiny_base), new_head=True)  # a language model
    drop(classifier, "model.norm.weight")
    with pytest.raises(ValueError, match=r"lacks 1 of the model's 21 tensors: model.norm.weight"):
        load_classifier(str(classifier), new_head=True)


def test_config_check_refuses_a_broken_reward_model(classifier: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "{i} {i + 2} -> {i} :", "answer": "1"}}\n' for i in range(40))
    )
    options = {"path": str(tmp_path / "rows.jsonl"), "verifier": "preference", "preference": {"model": str(classifier)}}
    task = {"name": "jsonl", "options": options}
    assert errors_of(tiny_base, task=task) == []
    drop(classifier, "score.weight")
    (error,) = errors_of(tiny_base, task=task)
    assert error.startswith("task: ") and "lacks 1 of the model's 21 tensors: score.weight" in error


def test_a_text_encoder_needs_its_blocks_but_no_head(folder: Path, tmp_path: Path) -> None:
    assert embedding.embed(["1 + 2"], str(folder)).any()  # a language model with its head
    evaluation = {"embedder": str(folder), "prompts": 8, "samples_per_prompt": 2}
    assert errors_of(folder, evaluation=evaluation) == []
    config = transformers.BertConfig(**SMALL, intermediate_size=64)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    assert examine(tmp_path / "bert", ENCODER, trust_remote_code=False)[:2] == (
        [],
        None,
    )  # no pooler, another head
    load_model(tmp_path / "bert", ENCODER, dtype=torch.float32, trust_remote_code=False)
    drop(tmp_path / "bert", "bert.encoder.layer.1.output.dense.weight")
    with pytest.raises(ValueError, match=r"lacks 1 .*encoder.layer.1.output.dense.weight"):
        load_model(tmp_path / "bert", ENCODER, dtype=torch.float32, trust_remote_code=False)
    drop(folder, "model.norm.weight")
    with pytest.raises(ValueError, match=r"evaluation.embedder: .*lacks 1 .*norm.weight"):
        embedding.embed(["1 + 2"], str(folder))
    whole = shutil.copytree(folder, tmp_path / "whole")
    change(whole, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    (error,) = errors_of(whole, evaluation=evaluation)
    assert error.startswith("evaluation.embedder: ") and "norm.weight" in error


def test_our_own_checkpoints_are_whole_too(tiny_checkpoint: Path, tiny_base: Path, tmp_path: Path) -> None:
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    bundled = model.save_pretrained(tmp_path / "bundled", bundle_base=True)
    drop(bundled / "base", "model.norm.weight")
    with pytest.raises(ValueError, match=r"base/model.safetensors lacks 1 of the model's 21 tensors"):
        LatentActionLM.from_pretrained(bundled)
    with pytest.raises(ValueError, match="is a model with latent actions, not its base LM"):
        from latent_control.auto import LatentActionForCausalLM

        LatentActionForCausalLM.wrap(model).save_pretrained(tmp_path / "export")
        load_base(tmp_path / "export")
    copied = shutil.copytree(bundled, tmp_path / "copied")
    name = next(name for name in read_shapes(copied / "latent_actions.safetensors") if name.startswith("policy."))
    change(copied, lambda tensors: tensors.pop(name), "latent_actions.safetensors")
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_policy(copied)


def test_a_token_level_policy_needs_all_that_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    from rollout_workers.model_host import load_host
    from rollout_workers.rollouts import HostSpec

    spec = HostSpec(
        level="token", checkpoint=str(tiny_base), token_blocks=1, policy_file=str(tmp_path / "policy.safetensors")
    )
    stack = token_policy(load_base(tiny_base), spec.token_trains, spec.token_blocks)[1]
    trained = {name: p.detach() + 1 for name, p in stack.named_parameters() if p.requires_grad}
    save_file(trained, tmp_path / "policy.safetensors")
    policy = load_host(spec, torch.device("cpu"), torch.float32).policy
    assert policy is not None and all(
        torch.equal(p, trained[name]) for name, p in policy.named_parameters() if name in trained
    )
    lost = sorted(trained)[0]
    change(tmp_path, lambda tensors: tensors.pop(lost), "policy.safetensors")
    with pytest.raises(ValueError, match=f"{lost} is missing"):
        load_host(spec, torch.device("cpu"), torch.float32)


def test_a_loader_asks_for_no_network(folder: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    asked: list[object] = []

    def refuse(*where: object, **__: object) -> None:
        asked.append(where)  # whoever asks may go on without an answer
        raise OSError("no network")

    def refuse_others(connection: socket.socket, address: object) -> None:
        if "127.0.0.1" in str(address):  # no network: another test's MLflow client may still look for its server
            raise ConnectionRefusedError(str(address))
        refuse(address)

    monkeypatch.setattr(socket.socket, "connect", refuse_others)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_classifier(str(classifier), new_head=True)
    examine(classifier, REWARD_MODEL, trust_remote_code=False)
    embedding.embed(["1"], str(folder))
    assert not asked


def test_a_config_of_the_same_width_is_told_from_another(tmp_path: Path) -> None:
    """An untied head in the files of a model that is said to be tied, and the other way round."""
    tied = make(tmp_path / "tied", "llama-tied")
    settings(tied, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks 1 .*lm_head.weight"):
        load_base(tied)
    assert LlamaConfig.from_pretrained(tied).tie_word_embeddings is False
