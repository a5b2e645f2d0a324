"""REINFORCE with a leave-one-out baseline (Kool et al., 2019; Ahmadian et al., 2024)."""

from __future__ import annotations

from latent_control.algorithms.common import AdvantageEstimate, Algorithm, Outcomes, centred


def rloo(outcomes: Outcomes) -> AdvantageEstimate:
    """r minus the mean of the *other* rollouts of the prompt: n / (n - 1) times r minus the mean of all n."""
    count = outcomes.groups().sum(1, keepdim=True)
    return AdvantageEstimate(advantages=outcomes.per_position(centred(outcomes) * count / (count - 1).clamp(min=1)))


RLOO = Algorithm(estimate=rloo)
