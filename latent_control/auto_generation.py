"""``generate`` as ``transformers`` has it: its settings, stopping criteria, streamers and results, for codes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.utils import ModelOutput

from latent_control.decoding.guide import Watch
from latent_control.decoding.stop_strings import stop_watch
from latent_control.records import Generation
from latent_control.text import load_tokenizer

# Settings of ``generate`` that are honoured; what else a caller sets is refused, not ignored.
_HONOURED = {
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "num_return_sequences",
    "return_dict_in_generate",
}
_HONOURED |= {"eos_token_id", "pad_token_id", "bos_token_id", "stop_strings", "use_cache"}
_WITHOUT_EFFECT: dict[str, Any] = {"num_beams": 1, "top_p": 1.0, "repetition_penalty": 1.0}


@dataclass
class LatentGenerateOutput(ModelOutput):
    """What ``generate`` returns when codes are asked for. Axes: R rows, P prompt, T new tokens."""

    sequences: torch.Tensor | None = None
    """[R, P + T]: prompts and new tokens"""
    codes: torch.Tensor | None = None
    """[R, T], the code that produced each new token; -1 after the end"""
    code_logp: torch.Tensor | None = None
    """[R, T], log-probability of each code where the policy chose it; 0 where it was forced, inside a span and after
    the end"""
    lengths: torch.Tensor | None = None
    """[R], new tokens"""


def settings_in_force(
    own: GenerationConfig, given: GenerationConfig | None, settings: dict[str, Any]
) -> GenerationConfig:
    """The generation config of a call: ``settings``, then ``given``, then the model's ``own``.

    Raises:
        ValueError: a setting that would be ignored.
    """
    given = given or own
    asked = {name: value for name, value in settings.items() if value is not None}
    asked |= {name: getattr(given, name, None) for name in _WITHOUT_EFFECT if name not in asked}
    refused = {
        name: value
        for name, value in asked.items()
        if name not in _HONOURED and value is not None and value != _WITHOUT_EFFECT.get(name)
    }
    if refused:
        named = ", ".join(f"{name}={value!r:.40}" for name, value in sorted(refused.items()))
        raise ValueError(
            f"generate does not know {named}: codes are chosen greedily, or sampled by temperature and top_k"
        )
    wanted = copy.deepcopy(given)
    for name in ("eos_token_id", "pad_token_id", "stop_strings"):
        if getattr(wanted, name) is None:
            setattr(wanted, name, getattr(own, name))
    for name, value in asked.items():
        setattr(wanted, name, value)
    return wanted


def greedy_defaults(
    lm: PreTrainedModel, max_new_tokens: int | None = None, stop: Sequence[str] = ()
) -> GenerationConfig:
    """Greedy decoding with the special tokens of the base LM, whose own sampling settings say nothing about codes, to
    one of the strings ``stop``."""
    of_base = lm.generation_config or lm.config
    tokens = {name: getattr(of_base, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, stop_strings=list(stop) or None, **tokens)


def new_token_limit(wanted: GenerationConfig, prompt: int) -> int:
    """How many new tokens."""
    if wanted.max_new_tokens is not None:
        return int(wanted.max_new_tokens)
    if wanted.max_length is None:
        raise ValueError("generate needs max_new_tokens: neither the call nor generation_config.json says how many")
    if wanted.max_length <= prompt:
        raise ValueError(
            f"max_length={wanted.max_length} leaves no room after prompts of {prompt} tokens; give max_new_tokens"
        )
    return int(wanted.max_length) - prompt


def string_watch(strings: str | list[str] | None, tokenizer: Any, folder: str, *others: Watch | None) -> Watch | None:
    """Ends a row whose new text holds one of ``strings``, read by ``tokenizer`` or the one in the model's ``folder``;
    and as ``others`` say."""
    listed = [strings] if isinstance(strings, str) else strings or []
    if listed and tokenizer is None:
        if not (Path(folder) / "tokenizer_config.json").is_file():
            raise ValueError("stop_strings are looked for in text: give tokenizer, too")
        tokenizer = _own_tokenizer(folder)
    return stop_watch(tokenizer, listed, *others)


@lru_cache(maxsize=4)
def _own_tokenizer(folder: str) -> Any:
    return load_tokenizer(folder, key=None)


def padded_output(prompts: torch.Tensor, out: Generation, pad: int | None) -> LatentGenerateOutput:
    """Prompts [R, P] with what was generated for them, cut to the longest."""
    longest = int(out.lengths.max())
    tokens, codes = out.tokens[:, :longest], out.actions[:, :longest]
    if pad is not None:
        tokens = tokens.masked_fill(codes < 0, pad)
    return LatentGenerateOutput(
        sequences=torch.cat([prompts, tokens], dim=1),
        codes=codes,
        code_logp=out.action_logp[:, :longest],
        lengths=out.lengths,
    )


def shown_to(prompts: torch.Tensor, criteria: StoppingCriteriaList, streamer: Any, pad: int) -> Watch | None:
    """Shows every step to stopping criteria and a streamer. All rows start together, so they are equally long."""
    if not criteria and streamer is None:
        return None
    sequences = prompts
    if streamer is not None:
        if len(prompts) > 1:
            raise ValueError(f"a streamer shows one sequence, not {len(prompts)}")
        streamer.put(prompts.cpu())

    def watch(rows: list[int], tokens: list[int], _: list[int]) -> Sequence[bool]:
        nonlocal sequences
        column = sequences.new_full((len(sequences), 1), pad)
        column[rows, 0] = torch.tensor(tokens, device=column.device)
        sequences = torch.cat([sequences, column], dim=1)
        if streamer is not None:
            streamer.put(column[0].cpu())
        if not criteria:
            return [False] * len(rows)
        ended = criteria(sequences, None)
        return [bool(ended[row]) for row in rows]

    return watch
