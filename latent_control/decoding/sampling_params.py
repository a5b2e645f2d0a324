"""Settings of one call of ``generate``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from transformers import PreTrainedModel

from latent_control.decoding.guide import Guide, Watch
from latent_control.distributions import rollout_seed
from latent_control.policies.bank import Blend
from latent_control.text import config_ends

Decode: TypeAlias = Literal["code", "token"]
LEAST_TEMPERATURE = 1e-4
"""Besides 0: logits divided by less may overflow."""
MIXTURE_CODES = 16
"""Codes of the mixture where nobody says how many (``benchmarks/decode_by_token.py``)."""


def require_temperature(temperature: float) -> float:
    """``ValueError`` unless ``temperature`` is 0 or a finite number from ``LEAST_TEMPERATURE`` on."""
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature={temperature}: need 0 (the most likely), or a finite number from {LEAST_TEMPERATURE} on"
        )
    return temperature


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """``SamplingParams(max_new_tokens=64, temperature=0.7, seed=0)``

    Raises:
        ValueError: a setting is out of range, or means nothing beside ``decode="token"``.
    """

    max_new_tokens: int | Sequence[int]
    """One number, or one for each output row."""
    temperature: float = 1.0
    """0: take the most likely action (token, where ``decode`` is "token")."""
    top_k: int | None = None
    """Sample among the k most likely actions."""
    seed: int | None = None
    """Row r draws from a random stream made of (seed, r) alone; ``None``: a seed from torch's global stream."""
    row_seeds: Sequence[int] | None = None
    """A random stream for each output row, in place of ``seed``."""
    stop_token: int | list[int] | None = None
    """End token or tokens; ``None``: the base's (all of them), -1: none."""
    repeats: int = 1
    """Rollouts of each prompt, which share its prefill."""
    batch_size: int | None = None
    """Rows decoded at once; ``None``: all."""
    return_features: bool = False
    """Also return the states that the policy read."""
    keep_responses: bool = False
    """Put responses into the prefix tree, too: a next turn goes on from them."""
    aliases: int | None = None
    """Number of most likely codes to search for those that emit the chosen one's token (``Generation.events``)."""
    decode: Decode = "code"
    """"code": the policy's code (the most likely or a sampled one) and the world model's most likely token given it.
    "token": the most likely token of the mixture sum_a pi(a) p(x | a), or one sampled from it, the temperature being
    the mixture's. Then ``Generation.actions`` are the codes most responsible for the tokens, which nobody sampled:
    such rows are no training data."""
    mixture_codes: int | None = MIXTURE_CODES
    """The k likeliest codes that the mixture sums over; ``None``: all. Each costs a pass of merge module and language
    head."""
    members: Sequence[Blend] | None = None
    """Of each prompt, the members of the actor's bank whose policy chooses (``PolicyBank.blend``)."""
    guide: Guide | None = None
    """Codes that are forced or allowed."""
    watch: Watch | None = None
    """Called at every step; may end rows."""

    def __post_init__(self) -> None:
        require_temperature(self.temperature)
        if (self.top_k is not None and self.top_k < 1) or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(f"top_k={self.top_k}, batch_size={self.batch_size}: need at least 1 of each")
        count = 1 if self.mixture_codes is None else self.mixture_codes
        if self.decode not in ("code", "token") or type(count) is not int or count < 1:
            raise ValueError(
                f"decode={self.decode!r}, mixture_codes={self.mixture_codes!r}: need decode 'code' or 'token', and "
                "mixture_codes a whole number from 1 (None: all)"
            )
        if self.decode == "token" and (self.top_k is not None or self.aliases is not None):
            name, why = ("top_k", "sampled") if self.top_k is not None else ("aliases", "compared with others")
            raise ValueError(
                f"{name}={getattr(self, name)} has no meaning beside decode='token', where no code is {why}: leave it "
                "out (mixture_codes says how many codes are summed over)"
            )

    @property
    def code_temperature(self) -> float:
        """Of the policy's distribution over codes: a mixture takes it as it is."""
        return self.temperature if self.decode == "code" else 1.0

    def limits(self, rows: int) -> list[int]:
        """New tokens of each row at most; ``ValueError`` unless there is a positive number for each."""
        limits = torch.as_tensor(self.max_new_tokens).reshape(-1)
        limits = limits.expand(rows) if len(limits) == 1 else limits
        if len(limits) != rows or rows == 0 or int(limits.min()) < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens!r}: need one positive number, or one for each of the {rows} rows"
            )
        return limits.tolist()

    def seeds(self, rows: int) -> Sequence[int]:
        """The seed of each row's random stream; ``ValueError`` unless ``row_seeds`` has one for each."""
        if self.row_seeds is None:
            start = int(torch.randint(2**31, ())) if self.seed is None else self.seed
            return [rollout_seed(start, row) for row in range(rows)]
        if len(self.row_seeds) != rows:
            raise ValueError(f"{len(self.row_seeds)} row_seeds given: need one for each of the {rows} rows")
        return self.row_seeds


def special_tokens(lm: PreTrainedModel, stop_token: int | list[int] | None) -> tuple[tuple[int, ...], int]:
    """(end tokens, pad token) of a base LM; chat models have several. ``stop_token`` -1 switches them off."""
    config = lm.generation_config or lm.config
    ends = config_ends(config) if stop_token is None else stop_token if isinstance(stop_token, list) else [stop_token]
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    return tuple(end for end in ends if end >= 0), pad
