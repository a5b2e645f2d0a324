"""REINFORCE++ (Hu et al., 2025): REINFORCE without groups, normalised over the whole batch."""

from __future__ import annotations

from latent_control.algorithms.common import AdvantageEstimate, Algorithm, Outcomes, normalised, sums_to_come


def reinforce_pp(outcomes: Outcomes) -> AdvantageEstimate:
    """The discounted rewards (and KL penalties) to come at each action, with mean 0 and standard deviation 1 over the
    batch."""
    sums = sums_to_come(outcomes.step_rewards(), outcomes.taken, outcomes.discount)
    return AdvantageEstimate(advantages=normalised(sums, outcomes))


REINFORCE_PP = Algorithm(estimate=reinforce_pp)
