"""Characters that take several tokens: their bytes, texts and places in OpenAI's log-probabilities."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from latent_control.decoding.token_scores import TokenScore
from rollout_workers.openai_api.logprobs import ChoiceState, LogprobWording
from rollout_workers.openai_api.protocol import DecodedRow
from rollout_workers.openai_api.text_stream import TokenTexts

TEXT = "é😀 ab"


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Letters and bytes: of byte-level BPE, or of SentencePiece with byte fallback."""
    if kind == "byte-level":
        raw = Tokenizer(BPE({letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
        raw.pre_tokenizer, raw.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b"]
        vocabulary = {letter: place for place, letter in enumerate(letters)}
        raw = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        raw.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_bytes_of_tokens_make_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    texts, ids = TokenTexts(tokenizer), tokenizer.encode(TEXT)
    assert texts.text(ids).strip() == TEXT and len(ids) > len(TEXT)
    scores = [TokenScore(logp=-1.0, top=((token, -1.0), (ids[-1], -2.0))) for token in ids]
    row = DecodedRow(text=texts.text(ids), tokens=ids, scores=scores)
    chat = LogprobWording(chat=True, texts=texts, ends=()).of(row, ChoiceState(), None, len(row.text))
    assert chat is not None and len(chat["content"]) == len(ids), "none is missing behind a character of four tokens"
    assert b"".join(bytes(entry["bytes"]) for entry in chat["content"]).decode() == row.text
    names = [entry["token"] for entry in chat["content"]]
    assert names[-2:] == ["a", "b"] and r"\xf0" in names and r"\x9f" in names
    plain = LogprobWording(chat=False, texts=texts, ends=()).of(row, ChoiceState(), None, len(row.text))
    assert plain is not None and r"bytes:\xf0" in plain["tokens"]
    offsets = dict(zip(plain["tokens"], plain["text_offset"], strict=True))
    assert offsets["b"] == len(row.text) - 1 and offsets[r"bytes:\xf0"] == offsets[r"bytes:\x9f"] == row.text.index(
        "😀"
    )
