"""Preference reward models: a transformers sequence classifier with one output, how it reads texts, and the loss that
trains it.

The loss is Bradley and Terry's: -log sigmoid(score of the chosen response - score of the rejected one). Left out:
margins, a centring term, and a language-modelling loss beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latent_control.bases.chat_template import render
from latent_control.bases.loading import REWARD_MODEL, UNTRAINED_REWARD_MODEL, load_config, load_model, require_whole
from latent_control.text import load_tokenizer

RECORD = "reward_model.json"
"""In a trained model's folder: how it reads texts, and how it did on held-out pairs."""
LONGEST = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How a reward model reads prompt and response. ``Reading(chat=False, max_length=1024)``."""

    chat: bool = False
    """As two messages in the tokenizer's chat template."""
    max_length: int = LONGEST
    """Tokens, the last ones: the response stands at the end."""


def reading_of(folder: str, *, chat: bool | None = None, max_length: int | None = None) -> Reading:
    """As the model in ``folder`` was trained, where its record says so, but for what is asked for."""
    record = Path(folder) / RECORD
    said: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))["reading"] if record.is_file() else {}
    asked = {name: value for name, value in (("chat", chat), ("max_length", max_length)) if value is not None}
    return Reading(**{**said, **asked})


def require_reward_model(model: str) -> None:
    """Of a reward model on this machine, config and files are looked at; its weights are not read.

    Raises: ValueError: there is no sequence classifier with one output, its files do not hold all of it, or it needs
        code of its own.
    """
    try:
        config = load_config(model, trust_remote_code=False, key=None)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no reward model at {model!r}: {str(error).partition(chr(10))[0]}") from error
    kinds = config.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds) or config.num_labels != 1:
        raise ValueError(
            f"{model} is {', '.join(kinds) or config.model_type} with {config.num_labels} outputs, not a sequence "
            "classifier with one; train one with latent-control reward train"
        )
    require_whole(model, REWARD_MODEL, trust_remote_code=False, key=None)


def load_classifier(
    model: str, dtype: torch.dtype = torch.float32, *, new_head: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier with one output and a tokenizer that can pad. Code in the model's folder is never run.

    Args:
        new_head: to be trained: the head is new where ``model`` is a language model.

    Raises: ValueError: tensors are missing (but for a new head), or it needs code of its own, or there is neither pad
        nor end token.
    """
    tokenizer = _padding_tokenizer(model)
    kind = UNTRAINED_REWARD_MODEL if new_head else REWARD_MODEL
    classifier = load_model(model, kind, dtype=dtype, trust_remote_code=False, key=None)
    classifier.config.pad_token_id = tokenizer.pad_token_id  # decoders score at the last token that is not this
    return classifier, tokenizer


def _padding_tokenizer(model: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(model, key=None)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {model!r} has neither a pad nor an end token; set pad_token in its "
                "tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, reading: Reading) -> list[int]:
    """Ids of prompt and response; at least one."""
    if reading.chat:
        if not tokenizer.chat_template:
            raise ValueError(f"chat is true, but {tokenizer.name_or_path!r} has no chat template; set it to false")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids = render(tokenizer, messages, tokenize=True, return_dict=False)
    else:
        ids = tokenizer(f"{prompt}{'' if prompt[-1:].isspace() else ' '}{response}")["input_ids"]
    return list(cast("list[int]", ids))[-reading.max_length :] or [cast("int", tokenizer.pad_token_id)]


def forward(classifier: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Scores [B] of rows of ids."""
    device, pad = classifier.device, classifier.config.pad_token_id
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    logits: Tensor = classifier(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits
    return logits[:, 0].float()


@torch.no_grad()
def scores(classifier: PreTrainedModel, rows: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """The score of each row, batched by length so that little is padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        for place, score in zip(places, forward(classifier, [rows[i] for i in places]).tolist(), strict=True):
            found[place] = score
    return found


def bradley_terry(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean loss in nats of scores [B] and [B], with the share of pairs in the right order and the mean margin."""
    margin = chosen - rejected
    metrics = {"accuracy": (margin > 0).float().mean().item(), "margin": margin.mean().item()}
    return -functional.logsigmoid(margin).mean(), metrics
