"""GRPO (Shao et al., 2024, DeepSeekMath) and its variant without the standard deviation (Liu et al., 2025, "Dr.
GRPO")."""

from __future__ import annotations

from latent_control.algorithms.common import AdvantageEstimate, Algorithm, Outcomes, centred, group_mean


def grpo(outcomes: Outcomes) -> AdvantageEstimate:
    """(r - mean) / std within the group, with the population std.

    Leaves out its length normalisation, which is the loss's choice (``loss_mean``).
    """
    differing = centred(outcomes)
    std = group_mean(differing**2, outcomes.groups()).sqrt()
    return AdvantageEstimate(advantages=outcomes.per_position(differing / (std + 1e-4)))


def dr_grpo(outcomes: Outcomes) -> AdvantageEstimate:
    """r - mean within the group: prompts on which the policy is nearly always right or wrong count no more than
    others."""
    return AdvantageEstimate(advantages=outcomes.per_position(centred(outcomes)))


GRPO, DR_GRPO = Algorithm(estimate=grpo), Algorithm(estimate=dr_grpo)
