"""Text in, text and codes out: an exported model as a server or a notebook uses it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoTokenizer

from latent_control.distributions import rollout_seed
from latent_control.model import LatentActionLM
from latent_control.persistence import base_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = "serving.json"
"""Beside an export: ``{"chat": false, "max_new_tokens": 16, "temperature": 1.0}``, what a request leaves open."""


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's end token; ``ValueError`` when it has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end token; set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Ids of ``text`` as the tokenizer gives them."""
    return list(cast("list[int]", tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """Ids of a prompt, ready to be continued: with the start token and no end token, or as a user message in the chat template.

    Raises:
        ValueError: ``chat``, but the tokenizer has no template.
    """
    if chat:
        return encode_messages(tokenizer, [{"role": "user", "content": text}])
    ids = encode_plain(tokenizer, text)
    # Some tokenizers close every text; the response has to follow.
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, ready for the assistant's turn; ``ValueError`` without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError(f"task.chat is true, but {tokenizer.name_or_path!r} has no chat template; set task.chat to false")
    return list(cast("list[int]", tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)))


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of generated ``ids``, up to the first end token and without special tokens or outer spaces."""
    end, kept = end_token(tokenizer), list(ids)
    if end in kept:
        kept = kept[: kept.index(end)]
    return cast("str", tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One completion to make. ``Ask(prompt_ids=[5, 6], max_new_tokens=16, temperature=0.0)``; ``TextModel.ask`` fills in defaults."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    """Of codes; 0 takes the likeliest."""
    top_k: int | None = None
    seed: int | None = None
    """``None``: torch's global stream decides."""
    codes: Sequence[int] = ()
    """To take at the first tokens; -1 leaves the choice to the policy."""
    allowed_codes: Sequence[int] | None = None
    """The only ones to choose from; ``None``: all."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """``Completion(text="3 + 4", tokens=["3", "+", "4"], codes=[17, 3, 60], code_log_probs=[-0.1, ...], finish_reason="stop", ...)``"""

    text: str
    tokens: list[str]
    """One per code, the end token included."""
    codes: list[int]
    code_log_probs: list[float]
    finish_reason: str
    """"stop" or "length" """
    prompt_tokens: int


@dataclass
class TextModel:
    """A latent-action LM with its tokenizer."""

    model: LatentActionLM
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, float | bool] = field(default_factory=lambda: {"chat": False, "max_new_tokens": 256, "temperature": 1.0})

    @classmethod
    def load(cls, folder: str | Path, *, dtype: str = "auto", device: str = "cpu") -> TextModel:
        """From an export.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = Path(folder)
        model = LatentActionLM.from_pretrained(path, dtype=dtype).cast_modules().to(device)
        source = path if (path / "tokenizer_config.json").is_file() else base_path(path)
        loaded = cls(model=model, tokenizer=AutoTokenizer.from_pretrained(str(source)))
        if (path / SETTINGS).is_file():
            loaded.settings |= json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        return loaded

    def ask(
        self,
        prompt: str | Sequence[dict[str, str]],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        codes: Sequence[int] = (),
        allowed_codes: Sequence[int] | None = None,
    ) -> Ask:
        """A text, or a conversation (``[{"role": "user", "content": ...}]``), with what the export says where nothing is given.

        Raises:
            ValueError: a value is out of range, naming it.
        """
        count = self.model.config.num_actions
        limit = int(self.settings["max_new_tokens"]) if max_new_tokens is None else max_new_tokens
        heat = float(self.settings["temperature"]) if temperature is None else temperature
        problems = [f"max_new_tokens={limit}: need 1 or more"] * (limit < 1)
        problems += [f"temperature={heat}: need 0 or more"] * (not heat >= 0)
        problems += [f"top_k={top_k}: need 1 or more"] * (top_k is not None and top_k < 1)
        problems += [f"codes holds {c}: need 0 to {count - 1}, or -1" for c in codes if not -1 <= c < count][:1]
        problems += [f"allowed_codes holds {c}: need 0 to {count - 1}" for c in allowed_codes or () if not 0 <= c < count][:1]
        problems += ["allowed_codes is empty: leave at least one"] * (allowed_codes is not None and not allowed_codes)
        if isinstance(prompt, str):
            ids = encode_text(self.tokenizer, prompt, chat=bool(self.settings["chat"]))
        else:
            ids = encode_messages(self.tokenizer, list(prompt))
        problems += ["the prompt has no tokens"] * (not ids)
        room = getattr(self.model.base.lm.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and len(ids) + limit > room:
            problems.append(f"{len(ids)} prompt tokens and max_new_tokens={limit} exceed the model's {room} positions")
        if problems:
            raise ValueError("; ".join(problems))
        return Ask(prompt_ids=ids, max_new_tokens=limit, temperature=heat, top_k=top_k, seed=seed, codes=codes, allowed_codes=allowed_codes)

    def complete(self, asks: Sequence[Ask]) -> list[Completion]:
        """All of them, those of one temperature and top-k in one batch; a seeded one is the same in any company."""
        done: dict[int, Completion] = {}

        def kind(index: int) -> tuple[float, int]:
            return asks[index].temperature, asks[index].top_k or 0

        for _, group in groupby(sorted(range(len(asks)), key=kind), key=kind):
            places = list(group)
            done |= zip(places, self._batch([asks[place] for place in places]), strict=True)
        return [done[place] for place in range(len(asks))]

    def _batch(self, asks: Sequence[Ask]) -> list[Completion]:
        device, count = self.model.codebook.device, self.model.config.num_actions
        width, longest = max(len(a.prompt_ids) for a in asks), max(a.max_new_tokens for a in asks)
        ids, mask = torch.zeros(len(asks), width, dtype=torch.long), torch.zeros(len(asks), width, dtype=torch.long)
        allowed, forced = torch.zeros(len(asks), count, dtype=torch.bool), torch.full((len(asks), longest), -1)
        for row, ask in enumerate(asks):
            ids[row, : len(ask.prompt_ids)], mask[row, : len(ask.prompt_ids)] = torch.tensor(ask.prompt_ids), 1
            allowed[row, slice(None) if ask.allowed_codes is None else list(ask.allowed_codes)] = True
            forced[row, : len(ask.codes)] = torch.tensor(ask.codes[:longest], dtype=torch.long)
        seeds = [rollout_seed(int(torch.randint(2**31, ())) if ask.seed is None else ask.seed) for ask in asks]
        found = self.model.generate(
            ids.to(device),
            mask.to(device),
            max_new_tokens=[ask.max_new_tokens for ask in asks],
            temperature=asks[0].temperature,
            top_k=asks[0].top_k,
            row_seeds=seeds,
            allowed_actions=allowed.to(device),
            forced_actions=forced.to(device),
        )
        lengths = found.lengths.tolist()
        return [
            Completion(
                text=decode_text(self.tokenizer, found.tokens[row, :n].tolist()),
                tokens=[self.tokenizer.decode([token]) for token in found.tokens[row, :n].tolist()],
                codes=found.actions[row, :n].tolist(),
                code_log_probs=found.action_logp[row, :n].tolist(),
                finish_reason=found.finish_reasons[row],
                prompt_tokens=len(ask.prompt_ids),
            )
            for row, (ask, n) in enumerate(zip(asks, lengths, strict=True))
        ]
