"""A base LM adapted by LoRA: merged once, the same as the adapted model, and told apart from what is no adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema import RunConfig
from latent_control import adapters
from pipeline.bases import resolve_base
from pipeline.preflight import check

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


def test_it_is_merged_once_and_again_when_it_changes(adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = adapters.merged_folder(adapter)
    merge: Callable[..., None] = adapters._merge
    merged: list[Path] = []
    monkeypatch.setattr(adapters, "_merge", lambda base, folder, *rest: (merged.append(folder), merge(base, folder, *rest))[1])
    assert adapters.merged_folder(adapter) == first and not merged
    settings: dict[str, Any] = json.loads((adapter / adapters.CONFIG).read_text())
    (adapter / adapters.CONFIG).write_text(json.dumps(settings | {"lora_alpha": 32}))
    assert adapters.merged_folder(adapter) != first and merged == [adapter]


def test_config_check_reads_the_base_and_merges_nothing(adapter: Path, cache: Path) -> None:
    config = RunConfig(base={"model": str(adapter)}, actions={"num_actions": 8, "policy_layers": 1}, clone={}, improve={})
    errors = check(config).errors
    assert not [error for error in errors if error.startswith("base.model")], errors
    assert not cache.exists()


def test_broken_adapters_are_refused_with_the_remedy(adapter: Path, tiny_base: Path, tmp_path: Path, cache: Path) -> None:
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


def test_a_base_beside_its_adapter_moves_with_it(adapter: Path, tiny_base: Path) -> None:
    settings: dict[str, Any] = json.loads((adapter / adapters.CONFIG).read_text())
    (adapter.parent / "here").symlink_to(tiny_base)
    (adapter / adapters.CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": "../here"}))
    assert adapters.adapted_base(adapter) == str(tiny_base)
