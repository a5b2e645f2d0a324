"""PPO's estimator (Schulman et al., 2016 and 2017): generalised advantages from a critic on the state the policy
reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from latent_control.algorithms.common import AdvantageEstimate, Algorithm, Outcomes, normalised, sums_to_come


def ppo(outcomes: Outcomes) -> AdvantageEstimate:
    """A_t = sum_i (discount lambda)^i delta_{t+i}, delta_t = r_t + discount V_{t+1} - V_t, V = 0 after the last action.

    The critic's targets are A + V; the policy's advantages are normalised over the batch afterwards.
    """
    assert outcomes.values is not None, "a critic's values are needed"
    values = torch.where(outcomes.taken, outcomes.values.double(), 0.0)
    following = F.pad(values[:, 1:], (0, 1))
    errors = outcomes.step_rewards() + outcomes.discount * following - values
    advantages = sums_to_come(errors, outcomes.taken, outcomes.discount * outcomes.gae_lambda)
    return AdvantageEstimate(advantages=normalised(advantages, outcomes), returns=(advantages + values).float())


PPO = Algorithm(estimate=ppo, critic=True)
