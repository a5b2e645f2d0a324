"""GRPO (Shao et al., 2024, DeepSeekMath) and its variant without the standard deviation (Liu et al., 2025, "Dr.
GRPO")."""

from __future__ import annotations

from latent_control.algorithms.common import Algorithm, Estimate, Outcomes, group_mean


def grpo(outcomes: Outcomes) -> Estimate:
    """(r - mean) / std within the group, with the population std.

    Leaves out its length normalisation, which is the loss's choice (``loss_mean``).
    """
    rewards, valid = outcomes.totals(), outcomes.groups()
    centred = (rewards - group_mean(rewards, valid)) * valid
    std = group_mean(centred**2, valid).sqrt()
    return Estimate(advantages=outcomes.per_position(centred / (std + 1e-4)))


def dr_grpo(outcomes: Outcomes) -> Estimate:
    """r - mean within the group: prompts on which the policy is nearly always right or wrong count no more than
    others."""
    rewards, valid = outcomes.totals(), outcomes.groups()
    return Estimate(advantages=outcomes.per_position((rewards - group_mean(rewards, valid)) * valid))


GRPO, DR_GRPO = Algorithm(estimate=grpo), Algorithm(estimate=dr_grpo)
