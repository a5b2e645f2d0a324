"""LoRA adapters with tokenizers of their own: which tokens have rows, and adapters named by hub id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema import RunConfig
from latent_control.bases import adapters
from latent_control.text import load_tokenizer
from pipeline.preflight.base_model import base_config_and_tokenizer, file_problems
from pipeline.stages.base_model import resolve_base

pytest_plugins = ("rl_fixtures",)
peft = pytest.importorskip("peft", reason="the extra 'lora' is not installed")
TEMPLATE = "{% for m in messages %}<s> {{ m.content }} </s>{% endfor %}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latent-control"


@pytest.fixture
def adapted(tiny_base: Path, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """``adapted(tokens, save={...}, **settings of LoraConfig)``: peft's model, in which all it trains has changed, and
    its folder with a tokenizer to which ``tokens`` were added."""

    def make(tokens: dict[str, Any], save: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, Path]:
        lm, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
        tokenizer.add_special_tokens(tokens)
        tokenizer.chat_template = TEMPLATE
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        lora = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings)
        model = peft.get_peft_model(lm, lora)
        generator = torch.Generator().manual_seed(3)
        for tensor in model.parameters():
            if tensor.requires_grad:
                torch.nn.init.normal_(tensor, std=0.3, generator=generator)
        folder = tmp_path / "adapter"
        model.save_pretrained(folder, **save or {})
        tokenizer.save_pretrained(folder)
        return model.eval(), folder

    return make


TWO = {"extra_special_tokens": ["<plan>", "<done>"]}


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": {"embed_tokens": [5, -1]}},
    ],
    ids=["resized", "kept whole", "embedding kept whole", "rows trained"],
)
def test_added_tokens_have_the_rows_that_were_trained(
    adapted: Callable[..., tuple[Any, Path]], cache: Path, tiny_base: Path, settings: dict[str, Any]
) -> None:
    rows = AutoModelForCausalLM.from_pretrained(tiny_base).config.vocab_size
    if "trainable_token_indices" in settings:
        settings = {"trainable_token_indices": {"embed_tokens": [5, rows + 1]}}
    model, folder = adapted(TWO, **settings)
    config = RunConfig(base={"model": str(folder)}, task={"chat": True})
    assert not list(file_problems(config, []))
    merged = resolve_base(config)
    ids = torch.tensor([[1, 9, rows, 5, rows + 1]])
    found = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
    for tokenizer in (load_tokenizer(merged), base_config_and_tokenizer(config)[1]):
        assert tokenizer.convert_tokens_to_ids(["<plan>", "<done>"]) == [rows, rows + 1]
        assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("settings", "save", "words"),
    [
        ({}, {"save_embedding_layers": False}, "has 2 tokens beyond the .* rows of the embedding"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {}, "has 2 new rows of the embedding, but not of the head"),
    ],
)
def test_tokens_without_rows_are_refused_before_work_starts(
    adapted: Callable[..., tuple[Any, Path]], cache: Path, settings: dict[str, Any], save: dict[str, Any], words: str
) -> None:
    _, folder = adapted(TWO, save, **settings)
    config = RunConfig(base={"model": str(folder)}, task={"chat": True})
    remedy = r".*save the adapter with embedding and head \(save_embedding_layers=True, or both in modules_to_save\)"
    with pytest.raises(ValueError, match=words + remedy):
        resolve_base(config)
    assert any(words.split(" the ")[0].removesuffix(".*") in problem for problem in file_problems(config, []))
    assert not list(cache.glob("*merged*"))


@torch.no_grad()
def test_a_pad_token_needs_no_row(adapted: Callable[..., tuple[Any, Path]], cache: Path, tiny_base: Path) -> None:
    """The usual line of tuning scripts: add [PAD], resize; peft then saves no embedding when told so."""
    model, folder = adapted({"pad_token": "[PAD]"}, {"save_embedding_layers": False})
    merged = AutoModelForCausalLM.from_pretrained(resolve_base(RunConfig(base={"model": str(folder)})))
    ids = torch.tensor([[1, 9, 5]])
    rows = merged.config.vocab_size
    assert load_tokenizer(folder).pad_token_id == rows
    torch.testing.assert_close(merged(ids).logits, model(ids).logits[..., :rows], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_adapter_named_by_hub_id_is_one(
    adapted: Callable[..., tuple[Any, Path]],
    cache: Path,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the hub's own cache, without a network."""
    model, folder = adapted(TWO)
    commit = "0" * 40
    for name, source in (("lora", folder), ("base", tiny_base)):
        place = tmp_path / "hub" / f"models--some-one--{name}"
        shutil.copytree(source, place / "snapshots" / commit)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)
    said = tmp_path / "hub" / "models--some-one--lora" / "snapshots" / commit / adapters.CONFIG
    said.write_text(json.dumps(json.loads(said.read_text()) | {"base_model_name_or_path": "some-one/base"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = RunConfig(base={"model": "some-one/lora"}, task={"chat": True})
    assert not list(file_problems(config, []))
    assert base_config_and_tokenizer(config)[1].chat_template == TEMPLATE
    merged = resolve_base(config)
    ids = torch.tensor([[1, 9, 5]])
    found = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert resolve_base(RunConfig(base={"model": "some-one/base"})) == "some-one/base"
    assert adapters.adapter_folder("some-one/absent", download=True) is None
