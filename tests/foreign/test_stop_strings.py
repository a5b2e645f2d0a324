"""Strings that end a response: where rows end, what their text and their loss are. Oracles: transformers' own
``generate(stop_strings=...)`` and the whole text, decoded once more after every token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.loading import ConfigErrors, load_config
from configs.schema import RolloutConfig as RolloutSettings
from latent_control.decoding.stop_strings import StopStrings, stopped_length
from latent_control.text import decode_text, spoken_text
from rollout_workers.engines import DecodeJob, load_engine
from rollout_workers.rollouts import HostSpec

STRINGS = ["\n\n", "Question:", "ab", "é", "stop", "\n", "an answer of several words", "北京"]
TEXT = "Question: what ends here?\nAnswer: an answer of several words, and stop.\n\n" * 40 + "été 北京 naïve " * 20


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE: tokens hold parts of characters, and of strings."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([TEXT], trainer)
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece: the first token of a text loses its space."""
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=500, special_tokens=["<pad>", "<s>", "</s>", *alphabet])
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


TOKENIZERS = {"byte level": byte_level(), "metaspace": metaspace()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base LM on the byte-level tokenizer, that seldom ends by itself."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), TOKENIZERS["byte level"]
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "vocab_size": len(tokenizer), "initializer_range": 0.6}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def decoded(base: Path, prompts: list[list[int]], stop: list[str], **job: Any) -> list[tuple[list[int], str]]:
    """(tokens, finish reason) of every row, by the engine ``local``."""
    settings = RolloutSettings(stop=tuple(stop), batch_size=5)
    host = HostSpec(level="base", checkpoint=str(base))
    engine = load_engine(host, settings, device=torch.device("cpu"), policy_dtype=torch.float32)
    seeds = tuple(range(len(prompts)))
    asked = {"repeats": 1, "seeds": seeds, "max_new_tokens": 40, "temperature": 0.0} | job
    out = engine.generate(DecodeJob(prompts=tuple(map(tuple, prompts)), **asked))
    return [
        (row[:length], reason)
        for row, length, reason in zip(out.tokens.tolist(), out.lengths.tolist(), out.finish_reasons, strict=True)
    ]


def test_rows_end_where_those_of_transformers_do(base: Path) -> None:
    """Greedy rows of ``generate(stop_strings=..., tokenizer=...)``, each alone. Its criterion also finds strings that
    begin in the prompt, so prompts end with what no string holds."""
    tokenizer, lm = TOKENIZERS["byte level"], LlamaForCausalLM.from_pretrained(base).eval()
    draw = random.Random(0)
    prompts = [
        [draw.randrange(3, len(tokenizer)) for _ in range(draw.randrange(1, 9))] + [tokenizer.encode("|")[0]]
        for _ in range(12)
    ]
    free = [row for row, _ in decoded(base, prompts, [])]
    ended = overhang = 0
    for length in (1, 3):
        # Strings that the rows do say, cut anywhere: inside tokens and across them.
        texts = [text for row in free for text in tokenizer.decode(row[6:]).split("\ufffd") if len(text) > length]
        strings = [text[1 : 1 + length] for text in draw.sample(texts, 3)]
        wanted = []
        for prompt in prompts:
            out = lm.generate(
                torch.tensor([prompt]), max_new_tokens=40, do_sample=False, stop_strings=strings, tokenizer=tokenizer
            )
            wanted.append(out[0, len(prompt) :].tolist())
        found = decoded(base, prompts, strings)
        assert [row for row, _ in found] == wanted
        for (row, reason), whole in zip(found, free, strict=True):
            text = tokenizer.decode(row)
            by_string = any(string in text for string in strings)
            assert reason == ("stop" if by_string or row[-1] == 2 else "length")
            assert row == whole[: len(row)]
            ended += by_string and row[-1] != 2
            overhang += by_string and not any(text.endswith(string) for string in strings)
    assert ended > 8 and overhang > 1  # the test tests something


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_window_of_tokens_finds_what_the_whole_text_holds(name: str) -> None:
    tokenizer, draw, found = TOKENIZERS[name], random.Random(1), 0
    likely = [token for string in STRINGS for token in tokenizer.encode(string, add_special_tokens=False)]
    for _ in range(60):
        strings = draw.sample(STRINGS, draw.randrange(1, 4))
        ids = [draw.choice(likely) if draw.random() < 0.2 else draw.randrange(3, len(tokenizer)) for _ in range(150)]
        place = next((n for n in range(1, 151) if any(s in spoken_text(tokenizer, ids[:n]) for s in strings)), None)
        assert stopped_length(tokenizer, strings, ids) == place
        found += place is not None and place > 40
    assert found > 3


def test_rows_forget_what_no_string_can_begin_in() -> None:
    tokenizer = TOKENIZERS["byte level"]
    watch = StopStrings(tokenizer, ["北京"])
    for _ in range(500):
        watch([0], [tokenizer.encode("a")[0]], [0])
    assert len(watch.windows[0]) < 64


def test_the_text_ends_before_the_string_and_the_tokens_with_it() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode(" 42\n\nQuestion: next")
    kept = stopped_length(tokenizer, ["\n\nQ"], ids)
    assert (
        kept is not None
        and "\n\nQ" in tokenizer.decode(ids[:kept])
        and "\n\nQ" not in tokenizer.decode(ids[: kept - 1])
    )
    assert decode_text(tokenizer, ids[:kept], ["\n\nQ"]) == "42"
    assert decode_text(tokenizer, ids[:kept], ["Que", "\n"]) == "42"  # the first in the text, whatever its place here
    assert (
        decode_text(tokenizer, [*tokenizer.encode("4"), 2, *tokenizer.encode("\n9")], ["\n"]) == "4"
    )  # end token first


def test_special_tokens_can_end_a_response() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["</answer>"]})
    ids = tokenizer.encode("4</answer>9", add_special_tokens=False)
    assert stopped_length(tokenizer, ["</answer>"], ids) == 2 and decode_text(tokenizer, ids[:2], ["</answer>"]) == "4"


def test_noise_ends_at_strings_too(base: Path) -> None:
    settings = RolloutSettings(engine="simulated", engine_options={"tokens_per_second": 1e9}, stop=("a", "\n"))
    host = HostSpec(level="base", checkpoint=str(base))
    engine = load_engine(host, settings, device=torch.device("cpu"), policy_dtype=torch.float32)
    out = engine.generate(DecodeJob(prompts=((5,),) * 20, repeats=2, seeds=tuple(range(40)), max_new_tokens=60))
    for row, length, reason in zip(out.tokens.tolist(), out.lengths.tolist(), out.finish_reasons, strict=True):
        says = [any(s in spoken_text(engine.tokenizer, row[:n]) for s in ("a", "\n")) for n in range(1, length + 1)]
        assert says == [False] * (length - 1) + [reason == "stop"]


def test_empty_and_bare_strings_are_refused_by_name(tmp_path: Path) -> None:
    for given in ('[""]', '"ab"'):
        (tmp_path / "c.yaml").write_text(f"base: {{model: {tmp_path}}}\nrollout: {{stop: {given}}}\n")
        with pytest.raises(ConfigErrors, match=r"rollout\.stop"):
            load_config(tmp_path / "c.yaml", [])
