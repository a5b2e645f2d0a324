"""A base LM adapted by LoRA: merged once, the same as the adapted model, and told apart from what is no adapter."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema import RunConfig
from latent_control.base_lm import load_base
from latent_control.bases import adapters
from latent_control.bases.model_cache import content_hash
from pipeline.preflight.check import check
from pipeline.stages.base_model import resolve_base

pytest_plugins = ("rl_fixtures",)
peft = pytest.importorskip("peft", reason="the extra 'lora' is not installed")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latent-control"


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    """A LoRA of rank 2 on the attention of ``tiny_base``, with weights that matter."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_base)
    adapted = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    for name, tensor in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(tensor, std=0.5, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def test_merged_is_the_adapted_model(adapter: Path, tiny_base: Path, cache: Path) -> None:
    assert adapters.is_adapter(adapter) and not adapters.is_adapter(tiny_base)
    folder = resolve_base(RunConfig(base={"model": str(adapter)}))
    ids = torch.tensor([[5, 9, 3, 7]])
    wanted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(adapter))(ids).logits
    found = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)(ids).logits
    assert float((found - plain).abs().max()) > 0.1
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(tiny_base).get_vocab()
    assert {path.suffix for path in Path(folder).iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert Path(folder).parent == cache


def test_it_is_merged_once_and_again_when_it_changes(
    adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = adapters.merged_folder(adapter)
    merge: Callable[..., None] = adapters._merge
    merged: list[Path] = []
    monkeypatch.setattr(
        adapters, "_merge", lambda base, folder, *rest: (merged.append(folder), merge(base, folder, *rest))[1]
    )
    assert adapters.merged_folder(adapter) == first and not merged
    settings: dict[str, Any] = json.loads((adapter / adapters.CONFIG).read_text())
    (adapter / adapters.CONFIG).write_text(json.dumps(settings | {"lora_alpha": 32}))
    assert adapters.merged_folder(adapter) != first and merged == [adapter]


def test_config_check_reads_the_base_and_merges_nothing(adapter: Path, cache: Path) -> None:
    config = RunConfig(
        base={"model": str(adapter)}, actions={"num_actions": 8, "policy_layers": 1}, clone={}, improve={}
    )
    errors = check(config).errors
    assert not [error for error in errors if error.startswith("base.model")], errors
    assert not cache.exists()


def test_broken_adapters_are_refused_with_the_remedy(
    adapter: Path, tiny_base: Path, tmp_path: Path, cache: Path
) -> None:
    settings: dict[str, Any] = json.loads((adapter / adapters.CONFIG).read_text())
    (adapter / adapters.CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="base_model_name_or_path None"):
        adapters.merged_folder(adapter)
    (adapter / adapters.CONFIG).write_text("{")
    with pytest.raises(ValueError, match="save the adapter again"):
        adapters.merged_folder(adapter)
    (adapter / adapters.CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="cannot be merged into its base"):
        adapters.merged_folder(adapter)
    assert not list(cache.glob("*merged*"))
    (adapter / adapters.WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="safe_serialization=True"):
        adapters.merged_folder(adapter)


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first(tensors: dict[str, torch.Tensor], part: str = "lora_B") -> str:
    return min(name for name in tensors if part in name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / adapters.WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
            "adapter_model.safetensors is a Git LFS",
        ),
        (
            lambda f: (f / adapters.WEIGHTS).write_bytes((f / adapters.WEIGHTS).read_bytes()[:-8]),
            r"should have \d+ bytes, but has",
        ),
        (lambda f: (f / adapters.WEIGHTS).rename(f / "adapter_model.bin"), "safe_serialization=True"),
        (
            lambda f: change(f / adapters.WEIGHTS, lambda t: t.pop(first(t))),
            r"lacks 1 tensors of the adapter: base_model.*q_proj.lora_B.weight;",
        ),
        (
            lambda f: change(f / adapters.WEIGHTS, lambda t: t.update(x=torch.ones(1))),
            "has 1 tensors with no place in the base",
        ),
        (
            lambda f: change(f / adapters.WEIGHTS, lambda t: t.update({first(t): torch.ones(3, 2)})),
            r"does not fit the base: .*size mismatch",
        ),
        (
            lambda f: said(f, target_modules=["c_attn"]),
            r"adapter_config.json does not fit the base: Target modules "
            r".*c_attn",
        ),
        (
            lambda f: said(f, megatron_config={"x": 1}, megatron_core="antigravity"),
            "has a megatron_config, which names Python modules",
        ),
        (lambda f: said(f, r=4), "does not fit the base: .*size mismatch"),
    ],
    ids=["lfs", "cut", "pickle", "missing", "unexpected", "shape", "other-modules", "imports", "rank"],
)
def test_an_adapter_that_is_not_whole_is_refused_from_its_files(
    adapter: Path, cache: Path, damage: Callable[[Path], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(adapter)
    config = RunConfig(base={"model": str(adapter)}, actions={"policy_layers": 1, "inverse_dynamics_layers": 1})
    (error,) = [error for error in check(config).errors if error.startswith("base.model")]
    assert re.search(message, error) and str(adapter) in error
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(ValueError, match=message):
        adapters.merged_folder(adapter)
    assert not list(cache.glob("*merged*"))


def said(folder: Path, **changed: Any) -> None:
    settings = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps(settings | changed))


def test_a_broken_base_under_an_adapter_is_refused(adapter: Path, cache: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    change(base / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    said(adapter, base_model_name_or_path=str(base))
    config = RunConfig(base={"model": str(adapter)}, actions={"policy_layers": 1, "inverse_dynamics_layers": 1})
    for text in (str(check(config).errors), str(pytest.raises(ValueError, adapters.merged_folder, adapter).value)):  # noqa: RUF061
        assert f"{base}/model.safetensors lacks 1 of the model's 21 tensors: model.norm.weight" in text


def test_a_merge_is_kept_under_content_not_place(adapter: Path, cache: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    said(adapter, base_model_name_or_path=str(base))
    first_merge = adapters.merged_folder(adapter)
    before = load_file(first_merge / "model.safetensors")
    # Trained again in the same folder: the same names, sizes and config.
    change(adapter / adapters.WEIGHTS, lambda tensors: tensors[first(tensors)].mul_(2))
    second = adapters.merged_folder(adapter)
    assert second != first_merge
    assert not torch.equal(
        load_file(second / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"],
        before["model.layers.0.self_attn.q_proj.weight"],
    )
    # The base replaced in place, with its old times.
    times = (base / "model.safetensors").stat()
    change(base / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(3))
    os.utime(base / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    third = adapters.merged_folder(adapter)
    assert third not in (first_merge, second)
    torch.testing.assert_close(
        load_file(third / "model.safetensors")["model.norm.weight"], 3 * before["model.norm.weight"]
    )
    # Elsewhere, the same content is the same model; so it is when the first state comes back.
    said(adapter, base_model_name_or_path="../moved")
    base.rename(adapter.parent / "moved")
    assert adapters.merged_folder(shutil.copytree(adapter, adapter.parent / "copied")) == adapters.merged_folder(
        adapter
    )


def test_a_hash_is_remembered_only_while_the_file_is_untouched(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    old = content_hash(path)
    assert not (cache / "hashes").exists(), "a file changed a moment ago may change again within one tick of the clock"
    monkeypatch.setattr("latent_control.bases.model_cache.SETTLED", -1.0)
    assert (
        content_hash(path) == old == hashlib.sha256(b"one").hexdigest() and len(list((cache / "hashes").iterdir())) == 1
    )
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert content_hash(path) == old
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_hash(path) == hashlib.sha256(b"two").hexdigest()


def test_files_that_change_while_they_are_merged_give_no_merge(
    adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge: Callable[..., None] = adapters._merge

    def slowly(*arguments: Any) -> None:
        merge(*arguments)
        said(adapter, lora_alpha=64)

    monkeypatch.setattr(adapters, "_merge", slowly)
    with pytest.raises(ValueError, match="changed while they were merged; try again"):
        adapters.merged_folder(adapter)
    assert not list(cache.glob("*merged*"))


def test_a_base_of_which_the_hub_s_cache_holds_the_config_alone_is_downloaded_first(
    adapter: Path, cache: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "snapshot"))
    (base / "model.safetensors").unlink()
    asked: list[str] = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        shutil.copy(tiny_base / "model.safetensors", base)
        return str(base)

    said(adapter, base_model_name_or_path="some-one/model")
    for module in ("adapters", "loading"):
        monkeypatch.setattr(f"latent_control.bases.{module}.local_folder", lambda _: base)
    monkeypatch.setattr(adapters, "snapshot_download", download)
    load = adapters.load_model
    monkeypatch.setattr(adapters, "load_model", lambda _, *rest, **named: load(base, *rest, **named))
    said(adapter, base_model_name_or_path="some-one/model")
    monkeypatch.setattr(adapters, "tokenizer_source", lambda _: str(base))
    first_merge = adapters.merged_folder(adapter)
    assert adapters.merged_folder(adapter) == first_merge and asked == ["some-one/model"]


@torch.no_grad()
def test_an_adapter_with_tokens_of_its_own(tiny_base: Path, cache: Path, tmp_path: Path) -> None:
    """Its tokenizer is the model's, and the embeddings it brings are."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    config = RunConfig(
        base={"model": str(tmp_path / "adapter")},
        actions={"policy_layers": 1, "inverse_dynamics_layers": 1},
        task={"chat": True},
    )
    assert not [error for error in check(config).errors if error.startswith(("base", "task"))]
    merged = adapters.merged_folder(tmp_path / "adapter")
    found = load_base(merged)
    assert found.get_input_embeddings().weight.shape[0] == len(tokenizer)
    torch.testing.assert_close(found.get_input_embeddings().weight, adapted.get_input_embeddings().weight)
    # Without the embeddings its tokens have no rows.
    change(
        tmp_path / "adapter" / adapters.WEIGHTS,
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "lora_" not in name],
    )
    with pytest.raises(
        ValueError, match=r"has 2 tokens beyond the \d+ rows of the embedding of .*adapter: <one>, <two>; save"
    ):
        adapters.merged_folder(tmp_path / "adapter")


def test_a_base_beside_its_adapter_moves_with_it(adapter: Path, tiny_base: Path) -> None:
    settings: dict[str, Any] = json.loads((adapter / adapters.CONFIG).read_text())
    (adapter.parent / "here").symlink_to(tiny_base)
    (adapter / adapters.CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": "../here"}))
    assert adapters.adapted_base(adapter) == str(tiny_base)
