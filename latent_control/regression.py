"""Policy improvement from stored rollouts by weighted regression: the method is how an advantage becomes a weight.

Axes: B rollouts, M loss positions, N codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from latent_control.losses import Metrics


def awr(advantages: torch.Tensor, temperature: float, cap: float) -> torch.Tensor:
    """min(exp(A / temperature), cap), advantages [B] -> weights [B] (advantage-weighted regression, Peng et al., 2019).

    Leaves out its learned value function: the baseline is in ``advantages`` already.
    """
    return torch.exp(advantages / temperature).clamp(max=cap)


def filtered(advantages: torch.Tensor, temperature: float, cap: float) -> torch.Tensor:
    """1 where a rollout was better than its baseline, else 0: behaviour cloning of the best; temperature and cap have
    no part."""
    return (advantages > 0).float()


WEIGHTS: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {"awr": awr, "filtered": filtered}


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
    kl = (log_probs.exp() * (log_probs - reference_log_probs)).sum(-1)
    loss = -(weights * logp).sum() / positions + kl_coefficient * kl.sum() / positions
    metrics = {
        "action_nll": -logp.sum() / positions,
        "weight_mean": weights.sum() / positions,
        "kl_to_reference": kl.sum() / positions,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}
