"""Measures of a codebook and of the composed model. Axes: M positions, N codes, V vocabulary, D width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from latent_control.distributions import action_log_probs
from latent_control.losses import negative_entropy
from latent_control.model import LatentActionLM, token_nll
from latent_control.records import RolloutBatch, TokenBatch

# A code is alive when its usage exceeds this share of the uniform usage 1/N.
ALIVE_SHARE = 0.1
POSITIONS = 1024
"""Most response positions at which NLL and KL are measured: each takes the world model's logits of every code."""


def code_perplexity(usage: torch.Tensor) -> float:
    """exp(H(usage)) of how often each code is used, [N] summing to 1: between 1 and N."""
    return math.exp(-float(negative_entropy(usage.double())))


def usage_measures(usage: torch.Tensor, whose: str) -> dict[str, float]:
    """Health of a codebook from how often each code is used, [N] summing to 1, named for who chose the codes.

    ``<whose>_alive_codes``: codes with usage > 0.1 / N. ``<whose>_code_perplexity``: ``code_perplexity``.
    """
    alive = int((usage > ALIVE_SHARE / len(usage)).sum())
    return {
        f"{whose}_alive_codes": float(alive),
        f"{whose}_alive_share": alive / len(usage),
        f"{whose}_code_perplexity": code_perplexity(usage),
    }


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What a model makes of the M response positions of a batch."""

    final: torch.Tensor
    """[M, D]"""
    labels: torch.Tensor
    """[M, N], inverse dynamics logits l of the span each position is in"""
    targets: torch.Tensor
    """[M], the tokens that follow"""
    policy: torch.Tensor
    """[M, N], policy logits"""
    number: torch.Tensor
    """[M], the span each position is in"""
    first: torch.Tensor
    """[M] bool, whether it begins that span"""


def positions_of(model: LatentActionLM, batch: TokenBatch) -> Positions:
    """Rows are right padded and everything is causal, so no attention mask is needed: padding never reaches a real
    position."""
    features = model.features(batch.input_ids)
    mask = batch.response_mask[:, 1:]
    spans = model.spans(mask)
    return Positions(
        final=features.read("final")[:, :-1][mask],
        labels=spans.labels(model.inverse_dynamics_logits(features))[mask],
        targets=batch.input_ids[:, 1:][mask],
        policy=model.policy_logits(features)[:, :-1][mask],
        number=spans.number,
        first=spans.first,
    )


@torch.no_grad()
def codebook_measures(model: LatentActionLM, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """Teacher-forced cross-entropy with inverse dynamics codes beside the base LM's, and codebook health, over
    ``batches``."""
    totals = {"nll_codes": 0.0, "nll_base": 0.0, "code_entropy": 0.0}
    counts = torch.zeros(model.config.num_actions, device=model.codebook.device)
    for batch in batches:
        at = positions_of(model, batch.to(counts.device))
        actions = at.labels.argmax(-1)
        world = model.world_logits_from_codes(at.final, model.codebook[actions])
        totals["nll_codes"] += float(token_nll(world, at.targets).sum())
        totals["nll_base"] += float(token_nll(model.base.logits(at.final), at.targets).sum())
        totals["code_entropy"] -= float(negative_entropy(torch.softmax(at.labels.float(), -1)).sum())
        counts += torch.bincount(actions, minlength=len(counts))
    positions = float(counts.sum())
    return {name: total / positions for name, total in totals.items()} | usage_measures(
        counts / positions, "inverse_dynamics"
    )


@torch.no_grad()
def reach_measures(model: LatentActionLM, batches: Sequence[TokenBatch], *, positions: int = 512) -> dict[str, float]:
    """What the codes can reach at ``positions`` response positions drawn from ``batches``, at all where there are
    fewer.

    ``coverage``: share of true next tokens that are the argmax of some code; ``distinct_tokens``: distinct argmax
    tokens of all N codes per position, mean.
    """
    covered = distinct = total = 0
    for batch, chosen in drawn(batches, [int(batch.response_mask[:, 1:].sum()) for batch in batches], positions):
        at = positions_of(model, batch.to(model.codebook.device))
        for rows in chosen.split(16):
            reached = model.world_logits_of_all(at.final[rows]).argmax(-1)  # [m, N]
            covered += int((reached == at.targets[rows, None]).any(1).sum())
            distinct += sum(len(set(row)) for row in reached.tolist())
        total += len(chosen)
    return {"coverage": covered / total, "distinct_tokens": distinct / total}


@torch.no_grad()
def marginal_measures(
    model: LatentActionLM, batches: Sequence[TokenBatch], *, positions: int = POSITIONS
) -> dict[str, float]:
    """The honest cost of adding latent actions, at about ``positions`` response positions (whole spans, drawn), at all
    where there are fewer.

    ``nll_marginal``: per token, -log sum_a pi(a) p_W(x|a), where x are the tokens of a span; beside the base LM's on
    the same positions (``nll_base_same``), and ``kl_base_marginal``: KL(base || marginal) of the next token, where a
    code is chosen.
    """
    totals = {"nll_marginal": 0.0, "nll_base_same": 0.0, "kl_base_marginal": 0.0}
    tokens = choices = 0
    spans = [int(model.spans(batch.response_mask[:, 1:]).first.sum()) for batch in batches]
    for batch, chosen in drawn(batches, spans, max(1, positions // model.config.span)):
        at = positions_of(model, batch.to(model.codebook.device))
        for some in chosen.to(at.number.device).split(8):
            rows = torch.isin(at.number, some).nonzero()[:, 0]
            for name, value in _marginal_sums(model, at, rows).items():
                totals[name] += value
            tokens, choices = tokens + len(rows), choices + len(some)
    return {name: total / (choices if name == "kl_base_marginal" else tokens) for name, total in totals.items()}


def _marginal_sums(model: LatentActionLM, at: Positions, rows: torch.Tensor) -> dict[str, float]:
    """Sums over the whole spans that ``rows`` are (m positions of s spans)."""
    first, targets = at.first[rows], at.targets[rows, None]
    span = first.cumsum(0) - 1
    world = torch.log_softmax(model.world_logits_of_all(at.final[rows]).float(), -1)  # [m, N, V]
    policy = torch.log_softmax(at.policy[rows[first]].float(), -1)  # [s, N]
    told = world.gather(-1, targets[..., None].expand(-1, world.shape[1], 1))[..., 0]
    base = torch.log_softmax(model.base.logits(at.final[rows]).float(), -1)  # [m, V]
    marginal = torch.logsumexp(policy[..., None] + world[first], 1)  # [s, V]
    return {
        "nll_marginal": -float(torch.logsumexp(policy.index_add(0, span, told), -1).sum()),
        "nll_base_same": -float(base.gather(-1, targets).sum()),
        "kl_base_marginal": float((base[first].exp() * (base[first] - marginal)).sum()),
    }


def drawn(
    batches: Sequence[TokenBatch], sizes: Sequence[int], wanted: int
) -> Iterator[tuple[TokenBatch, torch.Tensor]]:
    """Each batch with its share of ``wanted`` places, drawn without replacement from all that the batches have
    (``sizes``); batches without one are left out.

    A draw, by a fixed seed: evenly spaced places would fall on the same places of answers of one length every time.
    """
    chosen = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))[:wanted].sort().values
    first = 0
    for batch, size in zip(batches, sizes, strict=True):
        rows = chosen[(chosen >= first) & (chosen < first + size)] - first
        first += size
        if len(rows):
            yield batch, rows


@torch.no_grad()
def rollout_logp(
    model: LatentActionLM, batch: RolloutBatch, *, temperature: float = 1.0, top_k: int | None = None
) -> torch.Tensor:
    """Log-probability [B] of each rollout's codes under the model's policy as it would sample them; one base pass.

    Outside of the policy's own top k a code has probability 0: -inf. What it would choose outside of the behaviour's
    top k no rollout shows: it is missing from the mean weight, and must not be spread over what they do show.
    """
    batch = batch.to(model.codebook.device)
    states = model.features(batch.input_ids[:, :-1]).read(model.config.policy_state)
    log_probs = action_log_probs(model.policy(states), temperature=temperature, top_k=top_k)
    taken = log_probs.gather(-1, batch.actions[:, 1:, None])[..., 0]
    return torch.where(model.spans(batch.response_mask[:, 1:]).starts, taken, 0.0).double().sum(1)
