"""Reads the model: both policies at the rollouts' choices, and the effect of codes on tokens, within a time budget.

Axes: C choices, M states, N codes, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from latent_control.analysis.explain import read_choices, token_log_probs
from latent_control.model import LatentActionLM
from latent_control.policies.latent import LatentPolicy
from latent_control.records import TokenBatch
from pipeline.pages.explorer.corpus import Corpus

PROBES = 16
"""States of each code at which all codes are compared."""
LEAST_CHANCE = 1e-12
"""What is less likely counts as this in a ratio."""
ROWS_AT_ONCE, VALUES_AT_ONCE = 64, 8_000_000
RAISED, LOWERED, ANYWHERE, LEAST_MOVED = 6, 3, 3, 0.001
"""Tokens listed for a code: by how much more, and how much less likely it makes them, and its likeliest anywhere;
smaller differences of probabilities are left out."""


NEAR, APART = 3, 2
"""Codes most like a code that are listed, and tokens that tell the two apart on each side."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """The model after RL, the policy before it, and how codes are sampled."""

    model: LatentActionLM
    before: LatentPolicy
    tokenizer: Any
    temperature: float
    top_k: int | None


class Clock:
    """A time budget in parts: ``Clock(20).over(0.5)`` once 10 seconds have passed."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._started = seconds, time.perf_counter()

    def over(self, share: float) -> bool:
        """Whether this share of the budget is spent."""
        return time.perf_counter() - self._started > share * self._seconds


@dataclass(frozen=True, kw_only=True)
class Read:
    """Both policies at the c choices of the rollouts that were read."""

    rows: np.ndarray
    """The rollouts, in rising order."""
    choices: np.ndarray
    """[c], tokens of the corpus"""
    before: np.ndarray
    """[c, N] probabilities"""
    after: np.ndarray
    states: np.ndarray
    """[M], places among the c choices where the base's state was kept"""
    final: torch.Tensor
    """[M, D]"""


def token_batch(corpus: Corpus, rows: Sequence[int] | np.ndarray, device: torch.device) -> TokenBatch:
    """Rollouts ``rows`` of the corpus with their prompts, right padded."""
    starts = [len(corpus.prompt_tokens[r]) for r in rows]
    widths = [start + int(corpus.offsets[r + 1] - corpus.offsets[r]) for start, r in zip(starts, rows, strict=True)]
    ids, mask = (np.zeros((len(rows), max(widths)), np.int64) for _ in range(2))
    response = np.zeros(ids.shape, bool)
    for place, (r, start, width) in enumerate(zip(rows, starts, widths, strict=True)):
        cells = slice(corpus.offsets[r], corpus.offsets[r + 1])
        ids[place, :start], ids[place, start:width] = corpus.prompt_tokens[r], corpus.tokens[cells]
        mask[place, :width], response[place, start:width] = 1, corpus.generated[cells]
    return TokenBatch(
        input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), response_mask=torch.from_numpy(response)
    ).to(device)


def probes(corpus: Corpus, seed: int) -> np.ndarray:
    """Up to ``PROBES`` of each code's choices, as tokens of the corpus."""
    shuffled = np.random.default_rng(seed).permutation(corpus.choices)
    codes = corpus.actions[shuffled]
    return np.sort(np.concatenate([shuffled[codes == code][:PROBES] for code in range(corpus.num_actions)]))


def read(corpus: Corpus, models: Models, clock: Clock, share: float, seed: int = 0) -> Read:
    """Both policies at all choices, rollouts in random order, until ``share`` of the budget is spent (one batch at
    least)."""
    wanted, device = probes(corpus, seed), models.model.codebook.device
    order = np.random.default_rng(seed).permutation(len(corpus))
    bounds = np.searchsorted(corpus.choices, corpus.offsets)
    done: list[np.ndarray] = []
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, torch.Tensor]] = []
    for first in range(0, len(order), ROWS_AT_ONCE):
        if done and clock.over(share):
            break
        rows = np.sort(order[first : first + ROWS_AT_ONCE])
        policies = (models.before, models.model.policy)
        batch = token_batch(corpus, rows, device)
        told = read_choices(models.model, policies, batch, temperature=models.temperature, top_k=models.top_k)
        at = np.concatenate([corpus.choices[bounds[r] : bounds[r + 1]] for r in rows])
        kept = np.flatnonzero(np.isin(at, wanted))
        before, after = (p.cpu().numpy() for p in told.policies)
        found.append((at, before, after, at[kept], told.final[torch.from_numpy(kept).to(device)]))
        done.append(rows)
    at, before, after, states = (np.concatenate([part[i] for part in found]) for i in range(4))  # type: ignore[misc]
    order = np.argsort(at)
    return Read(
        rows=np.sort(np.concatenate(done)),
        choices=at[order],
        before=before[order],
        after=after[order],
        states=np.searchsorted(at[order], states),
        final=torch.cat([part[4] for part in found]),
    )


@dataclass(kw_only=True)
class Effects:
    """Sums over the states where each code was chosen ("own"), and over all states."""

    own: torch.Tensor
    """[N, V], p(token | code)"""
    mixture: torch.Tensor
    """[N, V], p(token | mixture before RL) at the same states"""
    anywhere: torch.Tensor
    """[N, V], p(token | code) at all states"""
    kl: torch.Tensor
    """[N]"""
    counts: torch.Tensor
    """[N], own states"""
    changed: torch.Tensor
    """[N], own states where the code's top token is not the mixture's"""
    agree: torch.Tensor
    """[N, N], states at which two codes have the same top token"""
    states: int = 0

    def add(self, chosen: torch.Tensor, own: torch.Tensor, mixture: torch.Tensor, world: torch.Tensor) -> None:
        """Count m states: the codes ``chosen`` there [m], log p(token | that code) [m, V], of the mixture [m, V], and
        of every code [m, N, V]."""
        for total, value in ((self.own, own.exp()), (self.mixture, mixture.exp())):
            total.index_add_(0, chosen, value)
        self.kl.index_add_(0, chosen, (own.exp() * (own - mixture)).sum(-1))
        self.counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=self.counts.dtype))
        self.changed.index_add_(0, chosen, (own.argmax(-1) != mixture.argmax(-1)).to(self.changed.dtype))
        tops = world.argmax(-1)
        for code in range(tops.shape[1]):
            self.agree[code] += (tops == tops[:, code, None]).sum(0)
        self.anywhere += world.exp().sum(0)
        self.states += len(chosen)

    def top(self, code: int) -> list[tuple[int, float, float, float]]:
        """(token, mean p, mean p of the mixture, log of their ratio) of what the code raises most and lowers most, in
        this order."""
        count = float(self.counts[code])
        if not count:
            return []
        own, mixture = (x[code] / count for x in (self.own, self.mixture))
        moved = own - mixture
        raised = moved.topk(min(RAISED, len(moved))).indices.tolist()
        lowered = (-moved).topk(min(LOWERED, len(moved))).indices.tolist()[::-1]
        listed = [t for t in dict.fromkeys(raised + lowered) if abs(float(moved[t])) >= LEAST_MOVED]
        return [(t, float(own[t]), float(mixture[t]), _log_ratio(float(own[t]), float(mixture[t]))) for t in listed]

    def likeliest(self, code: int) -> list[tuple[int, float]]:
        """(token, mean p) over all states."""
        mean = self.anywhere[code] / max(1, self.states)
        return [(t, float(mean[t])) for t in mean.topk(min(ANYWHERE, len(mean))).indices.tolist()]

    @property
    def agreement(self) -> np.ndarray:
        """[N, N], share of the states at which two codes have the same top token."""
        return np.asarray(self.agree.cpu().numpy() / max(1, self.states))

    def strength(self, code: int) -> float | None:
        """Mean KL(code, mixture) over its own states; ``None`` without any."""
        return float(self.kl[code] / self.counts[code]) if self.counts[code] else None

    def acts(self, code: int) -> float | None:
        """Share of its own states where it changes the top token; ``None`` without any."""
        return float(self.changed[code] / self.counts[code]) if self.counts[code] else None

    def near(self, code: int) -> list[tuple[int, float, list[tuple[int, float]], list[tuple[int, float]]]]:
        """The ``NEAR`` codes most like it: (code, share of states with the same top token, what it makes likelier than
        that code does, what less likely)."""
        shares = self.agree[code] / max(1, self.states)
        shares[code] = -1.0
        found = []
        for other in shares.topk(min(NEAR, len(shares) - 1)).indices.tolist():
            apart = (self.anywhere[code] - self.anywhere[other]) / max(1, self.states)
            sides = [_moved(apart), _moved(-apart)]
            found.append((other, float(shares[other]), *sides))
        return found


def _moved(apart: torch.Tensor) -> list[tuple[int, float]]:
    top = apart.topk(min(APART, len(apart)))
    return [(t, p) for t, p in zip(top.indices.tolist(), top.values.tolist(), strict=True) if p >= LEAST_MOVED]


def _log_ratio(a: float, b: float) -> float:
    return math.log(max(a, LEAST_CHANCE) / max(b, LEAST_CHANCE))


@torch.no_grad()
def effects(found: Read, codes: np.ndarray, models: Models, clock: Clock, share: float, seed: int = 0) -> Effects:
    """What the codes do, at the kept states in random order until ``share`` of the budget is spent (one piece at
    least).

    ``codes`` [c]: the codes chosen at the choices that were read.
    """
    n, v, device = (
        models.model.config.num_actions,
        models.model.base.lm.get_output_embeddings().weight.shape[0],
        found.final.device,
    )
    sums = Effects(
        **{name: torch.zeros(n, v, device=device) for name in ("own", "mixture", "anywhere")},
        **{name: torch.zeros(n, device=device) for name in ("kl", "counts", "changed")},
        agree=torch.zeros(n, n, device=device),
    )
    order = np.random.default_rng(seed).permutation(len(found.states))
    size = max(1, VALUES_AT_ONCE // (n * v))
    for first in range(0, len(order), size):
        if first and clock.over(share):
            break
        places = order[first : first + size]
        chosen = torch.from_numpy(codes[found.states[places]]).to(device)
        world = token_log_probs(models.model, found.final[torch.from_numpy(places).to(device)])  # [m, N, V]
        prior = torch.from_numpy(found.before[found.states[places]]).to(device).log()
        mixture = torch.logsumexp(prior[..., None] + world, 1)  # [m, V]
        own = world[torch.arange(len(places), device=device), chosen]
        sums.add(chosen, own, mixture, world)
    return sums
