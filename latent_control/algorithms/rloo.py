"""REINFORCE with a leave-one-out baseline (Kool et al., 2019; Ahmadian et al., 2024)."""

from __future__ import annotations

import torch

from latent_control.algorithms.common import Algorithm, Estimate, Outcomes


def rloo(outcomes: Outcomes) -> Estimate:
    """r minus the mean of the *other* rollouts of the prompt."""
    rewards, valid = outcomes.totals(), outcomes.groups()
    count = valid.sum(1, keepdim=True)
    others = ((rewards * valid).sum(1, keepdim=True) - rewards) / (count - 1).clamp(min=1)
    return Estimate(advantages=outcomes.per_position(torch.where(count > 1, rewards - others, 0.0) * valid))


RLOO = Algorithm(estimate=rloo)
