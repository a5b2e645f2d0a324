"""Rows of a server's engine: what is asked of one, its state, and what a step did for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from latent_control.decoding.sampling_params import Decode
from latent_control.decoding.token_choice import PLAIN, TokenChoice, TokenGrammar
from latent_control.decoding.token_scores import TokenScore
from latent_control.policies.bank import Blend


@dataclass(frozen=True, kw_only=True)
class RowParams:
    """``RowParams(prompt=(5, 9), max_tokens=16, temperature=0.0, seed=0)``: one row and all that determines it."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    """0: the most likely code (token, where ``decode`` is "token")"""
    seed: int
    top_k: int | None = None
    """Sample among the k most likely codes"""
    decode: Decode = "code"
    choice: TokenChoice = PLAIN
    """Of tokens, where ``decode`` is "token" """
    codes: tuple[int | None, ...] | None = None
    """Forced from the first token on; ``None`` leaves one to the policy"""
    allowed: tuple[int, ...] | None = None
    """Codes that may be chosen; ``None``: all"""
    member: Blend | None = None
    """Of a bank: whose policy chooses"""
    grammar: TokenGrammar | None = None
    """What may be written. By code: the policy chooses among the codes whose token it allows, where there is none
    among all, each with its most likely allowed token. By token: the mixture over the allowed tokens"""
    top_scores: int | None = None
    """Log-probabilities of the token and of the n likeliest ones, under the mixture over all codes; ``None``: none"""


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """What a step did for one row."""

    row: int
    token: int
    code: int
    code_logp: float
    """As ``Generation.action_logp``"""
    score: TokenScore | None = None
    codes_left: int | None = None
    """How many codes the row's grammar left to choose among; ``None``: no grammar, or inside a span"""
    finish: str | None = None
    """"stop", "length"; ``None``: the row goes on"""


@dataclass(kw_only=True, eq=False)
class StreamRow:
    """A row on its way."""

    params: RowParams
    tokens: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.draws = np.random.Generator(np.random.Philox(key=self.params.seed))
        self.steered = self.params.codes is not None or self.params.allowed is not None

    def push(self, token: int) -> None:
        """Go on behind a token."""
        self.tokens.append(token)
        if self.params.choice is not PLAIN:
            self.counts[token] += 1

    def may(self, codes: int) -> torch.Tensor:
        """bool [N], of ``codes`` codes those that its next token may have."""
        forced, place, allowed = self.params.codes, len(self.tokens), self.params.allowed
        code = forced[place] if forced is not None and place < len(forced) else None
        listed = [code] if code is not None else range(codes) if allowed is None else allowed
        return torch.zeros(codes, dtype=torch.bool).index_fill(0, torch.tensor(list(listed)), True)
