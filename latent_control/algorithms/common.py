"""What the algorithms share: the outcomes of a batch, group means, discounted sums, batch normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROUNDING = 1e-12
"""Of float64 sums over a batch, relative to what is summed."""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What a batch came to: B rollouts, ``group_size`` of each prompt in a run, of up to A actions."""

    rewards: torch.Tensor
    """[B], of whole rollouts"""
    valid: torch.Tensor
    """[B] bool, False where the verifier failed: such a rollout gets advantage 0 and stays out of every mean"""
    group_size: int
    taken: torch.Tensor
    """[B, A] bool, actions there are, of each row in one run; none where not valid"""
    penalties: torch.Tensor | None = None
    """[B, A], added to the reward where the action was taken (KL in the reward); ``None`` is 0"""
    baselines: torch.Tensor | None = None
    """[B], reward of the prompt's greedy rollout, NaN where its verifier failed; for algorithms that ask for it"""
    values: torch.Tensor | None = None
    """[B, A], a critic's estimates of what is to come, for algorithms that ask for it"""
    discount: float = 1.0
    gae_lambda: float = 1.0
    average: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    """Mean over the learners, in place or not, of what each has computed on its share"""

    def totals(self) -> torch.Tensor:
        """Reward and penalties of each rollout, float64 [P, G]; 0 where not valid."""
        total = torch.where(self.valid, self.rewards.double(), 0.0)
        if self.penalties is not None:
            total = total + (self.penalties * self.taken).sum(1)
        return total.view(-1, self.group_size)

    def groups(self) -> torch.Tensor:
        """``valid`` by group, [P, G]."""
        return self.valid.view(-1, self.group_size)

    def per_position(self, advantages: torch.Tensor) -> torch.Tensor:
        """Advantages of rollouts [P, G] at each of their actions, float32 [B, A]."""
        return torch.where(self.taken, advantages.reshape(-1, 1), 0.0).float()

    def step_rewards(self) -> torch.Tensor:
        """float64 [B, A]: penalties, and the rollout's reward at its last action."""
        last = self.taken & ~torch.nn.functional.pad(self.taken[:, 1:], (0, 1))
        rewards = torch.where(last, torch.where(self.valid, self.rewards.double(), 0.0)[:, None], 0.0)
        return rewards if self.penalties is None else rewards + torch.where(self.taken, self.penalties, 0.0)


@dataclass(frozen=True, kw_only=True)
class AdvantageEstimate:
    """What an algorithm makes of outcomes."""

    advantages: torch.Tensor
    """[B, A], 0 where no action was taken"""
    returns: torch.Tensor | None = None
    """[B, A], what a critic's values should have been"""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An estimator of advantages and what it needs beside rewards."""

    estimate: Callable[[Outcomes], AdvantageEstimate]
    critic: bool = False
    """Needs ``Outcomes.values``."""
    greedy: bool = False
    """Needs ``Outcomes.baselines``: one greedy rollout more per prompt."""


def group_mean(rewards: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the valid rollouts of each group, [P, 1], of rewards [P, G]."""
    return (rewards * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)


def centred(outcomes: Outcomes) -> torch.Tensor:
    """Rewards minus their group's mean, float64 [P, G]; 0 where not valid, and exactly 0 where a group's are equal.

    The mean is taken of what lies above the lowest reward: that of equal numbers rounds, that of zeros does not.
    """
    rewards, valid = outcomes.totals(), outcomes.groups()
    lowest = rewards.masked_fill(~valid, math.inf).amin(1, keepdim=True)
    above = torch.where(valid, rewards - lowest, 0.0)
    return (above - group_mean(above, valid)) * valid


def sums_to_come(steps: torch.Tensor, taken: torch.Tensor, decay: float) -> torch.Tensor:
    """sum_{i >= t} decay^(i - t) steps_i over each row's run of actions, [B, A]."""
    sums, later = torch.zeros_like(steps), torch.zeros_like(steps[:, 0])
    for t in reversed(range(steps.shape[1])):
        later = torch.where(taken[:, t], steps[:, t] + decay * later, 0.0)
        sums[:, t] = later
    return sums


def normalised(advantages: torch.Tensor, outcomes: Outcomes) -> torch.Tensor:
    """Advantages [B, A] with mean 0 and population standard deviation 1 over all actions of the batch, on all learners;
    float32, and exactly 0 where they are equal.

    Two passes in float64: the mean, then the squares of what differs from it. A spread that rounding alone explains
    (``ROUNDING`` of the root mean square) is none.
    """
    taken, advantages = outcomes.taken, advantages.double()

    def mean(values: torch.Tensor) -> torch.Tensor:
        total, count = outcomes.average(torch.stack([torch.where(taken, values, 0.0).sum(), taken.sum().double()]))
        return total / count.clamp(min=1e-6)

    differing = advantages - mean(advantages)
    std = mean(differing**2).sqrt()
    spread = std > ROUNDING * mean(advantages**2).sqrt()
    return torch.where(taken & spread, differing / (std + 1e-8), 0.0).float()
