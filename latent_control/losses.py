"""The training losses as free functions: tensors and named scalars in, (loss, metrics) out.

Axes: M loss positions (flattened over rollouts and tokens), N codes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from latent_control.aliases import event_log_prob

Metrics = dict[str, torch.Tensor]


def kl_divergence(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The exact KL(p || reference), [M], of log-probabilities [M, N] without truncation."""
    return (log_probs.exp() * (log_probs - reference)).sum(-1)


def straight_through_codes(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gumbel-softmax with a hard forward pass (Jang et al., 2017): logits [M, N] -> (one-hot o, soft g), both [M, N].

    g = softmax((l + Gumbel)/tau), o = stopgrad(onehot(argmax g) - g) + g.
    """
    uniforms = torch.rand(logits.shape, generator=generator, device=logits.device).clamp_(1e-10, 1 - 1e-7)
    soft = torch.softmax((logits.float() - torch.log(-torch.log(uniforms))) / temperature, -1)
    hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return (hard - soft).detach() + soft, soft


def usage_of(logits: torch.Tensor) -> torch.Tensor:
    """Summed code probabilities [N] of logits [M, N], before division by the number of positions."""
    return torch.softmax(logits.float(), -1).sum(0)


def negative_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """sum p log p over the last axis, with 0 log 0 = 0."""
    return torch.xlogy(probabilities, probabilities).sum(-1)


def latent_action_loss(
    nll: torch.Tensor,
    logits: torch.Tensor,
    soft: torch.Tensor,
    *,
    usage: torch.Tensor,
    usage_weight: float,
    entropy_weight: float,
    positions: float,
) -> tuple[torch.Tensor, Metrics]:
    """Stage 1a: mean nll + beta_u * sum_k qbar_k log qbar_k + beta_e * mean_t sum_k g log g (method.md 4).

    Args:
        nll: -log p_W(x_{t+1} | x, a), [M].
        logits: inverse dynamics logits l, [M, N].
        soft: relaxed codes g, [M, N].
        usage: qbar [N], the mean of softmax(l) over the *whole* batch (all microbatches, all workers), without
            gradient.
        positions: loss positions of the whole batch, by which sums are divided.

    The usage term enters through its linearisation around ``usage``, sum_k (log qbar_k + 1) q_k, whose gradient summed
    over microbatches is that of the whole batch's term.
    """
    prediction = nll.sum() / positions
    slope = usage.clamp(min=1e-12).log() + 1.0
    linear_usage = (slope * usage_of(logits)).sum() / positions
    relaxed = negative_entropy(soft).sum() / positions
    loss = prediction + usage_weight * linear_usage + entropy_weight * relaxed
    return loss, {"nll_sampled_codes": prediction.detach()}


def cloning_loss(
    policy_logits: torch.Tensor, targets: torch.Tensor, *, soft: bool, positions: float
) -> tuple[torch.Tensor, Metrics]:
    """Stage 1b: KL(softmax(l) || pi) (``soft``) or cross-entropy with argmax l; both logits [M, N]."""
    log_policy = torch.log_softmax(policy_logits.float(), -1)
    labels = targets.argmax(-1)
    if soft:
        log_target = torch.log_softmax(targets.float(), -1)
        loss = (log_target.exp() * (log_target - log_policy)).sum() / positions
    else:
        loss = F.nll_loss(log_policy, labels, reduction="sum") / positions
    agreement = (log_policy.argmax(-1) == labels).sum() / positions
    return loss, {"agreement": agreement.detach()}


Surrogate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(ratio, the same clipped, advantages, log-probabilities of the actions; all [M]) -> what is maximised, [M]."""


def ppo_surrogate(
    ratio: torch.Tensor, clipped: torch.Tensor, advantages: torch.Tensor, logp: torch.Tensor
) -> torch.Tensor:
    """min(r A, clip(r) A) (Schulman et al., 2017): no gradient where the ratio has left the interval already."""
    return torch.minimum(ratio * advantages, clipped * advantages)


def cispo_surrogate(
    ratio: torch.Tensor, clipped: torch.Tensor, advantages: torch.Tensor, logp: torch.Tensor
) -> torch.Tensor:
    """stopgrad(clip(r)) A log pi (CISPO; MiniMax, 2025, "MiniMax-M1"): every action keeps its gradient, with a bounded
    weight."""
    return clipped.detach() * advantages * logp


SURROGATES: dict[str, Surrogate] = {"ppo": ppo_surrogate, "cispo": cispo_surrogate}
"""By ``improve.surrogate``."""


def sequence_mean(values: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """The mean of each sequence's values at each of its positions: values [M] and the sequences' numbers [M] -> [M]."""
    size = int(sequences.max()) + 1 if len(sequences) else 0
    sums = values.new_zeros(size).index_add(0, sequences, values)
    return (sums / torch.bincount(sequences, minlength=size).clamp(min=1))[sequences]


def truncated_importance(log_ratio: torch.Tensor, weights: torch.Tensor, cap: float) -> tuple[torch.Tensor, Metrics]:
    """min(cap, exp(log_ratio)), [M], of the learner's probability by the sampler's (Espeholt et al., 2018); ``weights``
    as of the surrogate."""
    ratio = torch.exp(log_ratio)
    capped = (weights * (ratio > cap)).sum()
    return ratio.clamp(max=cap), {"importance_mean": (weights * ratio).sum(), "importance_capped_share": capped}


def clipped_surrogate(
    log_probs: torch.Tensor,
    *,
    actions: torch.Tensor,
    action_logp: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    reference_log_probs: torch.Tensor | None = None,
    full_log_probs: torch.Tensor | None = None,
    proximal_logp: torch.Tensor | None = None,
    importance_cap: float = math.inf,
    events: torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
    surrogate: str = "ppo",
) -> tuple[torch.Tensor, Metrics]:
    """Stage 3: a surrogate (``SURROGATES``) on the clipped ratio of actions, with exact KL and entropy over N.

    Args:
        log_probs: of the current policy under the sampler's truncation, [M, N].
        actions: sampled codes [M]; ``action_logp``: their stored behaviour log-probabilities [M].
        advantages: [M]; ``weights``: each position's share in the mean, summing to 1 over the minibatch, [M].
        reference_log_probs: of the cloned policy without truncation [M, N], needed when ``kl_coefficient`` > 0.
        full_log_probs: of the current policy without truncation [M, N], for the KL; ``None``: ``log_probs`` are.
        proximal_logp: of the actions under the policy at the start of the update [M]: the ratio is to it, and the
            surrogate is weighted by ``truncated_importance`` (decoupled PPO, Hilton et al., 2022).
        events: [M, N] bool, codes of the same consequence (``aliases``): ratio and log-probabilities are theirs.
        sequences: [M] int64, the rollout that each position is of: the ratio is the geometric mean of the rollout's
            (GSPO; Zheng et al., 2025). ``None``: each action has its own.

    Metrics are weighted sums too, so those of microbatches add up.
    """
    logp = event_log_prob(log_probs, actions, events)
    log_ratio = logp - (action_logp if proximal_logp is None else proximal_logp)
    ratio = torch.exp(log_ratio if sequences is None else sequence_mean(log_ratio, sequences))
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = SURROGATES[surrogate](ratio, clipped, advantages, logp)
    importance: Metrics = {}
    if proximal_logp is not None:
        factor, importance = truncated_importance(proximal_logp - action_logp, weights, importance_cap)
        objective = objective * factor
    # 0 log 0 = 0, in the gradient too: actions outside the support have log-probability -inf.
    entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs.isneginf(), 0.0)).sum(-1)
    loss = -(weights * objective).sum() - entropy_coefficient * (weights * entropy).sum()
    metrics = {
        "entropy": (weights * entropy).sum(),
        "clip_share": (weights * (ratio != clipped)).sum(),
        "ratio_mean": (weights * ratio).sum(),
        "logp_gap": (weights * (logp - action_logp).abs()).sum(),
        **importance,
    }
    if reference_log_probs is not None:
        full = log_probs if full_log_probs is None else full_log_probs
        kl = kl_divergence(full, reference_log_probs)
        loss = loss + kl_coefficient * (weights * kl).sum()
        metrics["kl_to_reference"] = (weights * kl).sum()
    return loss, {name: value.detach() for name, value in metrics.items()}


def value_loss(values: torch.Tensor, returns: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
    """Half the squared error of a critic's values [M] against returns [M], each position counting ``weights`` [M]."""
    loss = 0.5 * (weights * (values.float() - returns) ** 2).sum()
    return loss, {"value_loss": loss.detach(), "value_mean": (weights * values).sum().detach()}


def awr(advantages: torch.Tensor, temperature: float, cap: float) -> torch.Tensor:
    """min(exp(A / temperature), cap), advantages [B] -> weights [B] (advantage-weighted regression, Peng et al., 2019).

    Leaves out its learned value function: the baseline is in ``advantages`` already.
    """
    return torch.exp(advantages / temperature).clamp(max=cap)


def filtered(advantages: torch.Tensor, temperature: float, cap: float) -> torch.Tensor:
    """1 where a rollout was better than its baseline, else 0: behaviour cloning of the best; temperature and cap have
    no part."""
    return (advantages > 0).float()


REGRESSION_WEIGHTS: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {"awr": awr, "filtered": filtered}
"""How an advantage becomes a weight of ``weighted_regression``, by method."""


def weighted_regression(
    log_probs: torch.Tensor,
    *,
    actions: torch.Tensor,
    weights: torch.Tensor,
    reference_log_probs: torch.Tensor,
    kl_coefficient: float,
    positions: float,
) -> tuple[torch.Tensor, Metrics]:
    """-sum w log pi(a) / positions + kl_coefficient * the mean exact KL(pi || reference); log-probabilities [M, N], the
    rest [M]."""
    logp = log_probs.gather(-1, actions[:, None])[:, 0]
    kl = kl_divergence(log_probs, reference_log_probs)
    loss = -(weights * logp).sum() / positions + kl_coefficient * kl.sum() / positions
    metrics = {
        "action_nll": -logp.sum() / positions,
        "weight_mean": weights.sum() / positions,
        "kl_to_reference": kl.sum() / positions,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}
