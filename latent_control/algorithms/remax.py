"""ReMax (Li et al., 2023): REINFORCE with the greedy rollout's reward as baseline."""

from __future__ import annotations

import torch

from latent_control.algorithms.common import AdvantageEstimate, Algorithm, Outcomes


def remax(outcomes: Outcomes) -> AdvantageEstimate:
    """r minus the reward of the prompt's greedy rollout; 0 where that could not be judged."""
    assert outcomes.baselines is not None, "the rollouts came without the rewards of greedy ones"
    baselines = outcomes.baselines.view(-1, outcomes.group_size)
    known = outcomes.groups() & ~baselines.isnan()
    return AdvantageEstimate(advantages=outcomes.per_position(torch.where(known, outcomes.totals() - baselines, 0.0)))


REMAX = Algorithm(estimate=remax, greedy=True)
