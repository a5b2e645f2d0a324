"""Learning the Q head from stored rollouts by double DQN (van Hasselt et al., 2016, arXiv 1509.06461); the base is
frozen.

The reward comes at a rollout's end, once. The buffer is all there is, so the online network chooses among codes that
the policy may take only (``supported``), and targets stay within the rewards that were seen. Left out: prioritised
replay and n-step returns.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from latent_control.losses import Metrics
from latent_control.model import LatentActionLM
from latent_control.records import RolloutBatch
from latent_control.search.q_head import QHead, double_dqn_targets, q_loss, supported


@dataclass(frozen=True, kw_only=True)
class QSettings:
    """Dials of the training.

    ``QSettings(updates=2000, batch_size=128)`` takes two minutes on one core for the embedded model.
    """

    updates: int = 2000
    batch_size: int = 128
    """Rollouts of an update"""
    learning_rate: float = 1e-3
    hidden: int = 256
    """Inner width of the head; 0 is a linear one"""
    discount: float = 1.0
    """Per code; less than 1 prefers short responses"""
    support: float = 0.1
    """Codes less likely than this share of the likeliest one's probability are left out of every maximum"""
    target_every: int = 50
    """Updates between copies of the head into the target network"""
    heldout_share: float = 0.1
    """Of the prompts, whose rollouts only measure"""
    evaluate_every: int = 200
    cache_megabytes: float = 2048.0
    """For the base's states"""

    def __post_init__(self) -> None:
        least = {"updates": 1, "batch_size": 1, "target_every": 1, "evaluate_every": 1, "hidden": 0}
        wrong = [
            f"{name} is {getattr(self, name)}, must be at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        wrong += [] if 0 < self.discount <= 1 else [f"discount is {self.discount}, must be above 0 and at most 1"]
        wrong += (
            [] if 0 < self.heldout_share < 1 else [f"heldout_share is {self.heldout_share}, must lie between 0 and 1"]
        )
        wrong += [] if 0 < self.support <= 1 else [f"support is {self.support}, must be above 0 and at most 1"]
        wrong += [] if self.learning_rate > 0 else [f"learning_rate is {self.learning_rate}, must be above 0"]
        if wrong:
            raise ValueError("; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """M choices of codes, those of a rollout in their order and next to each other."""

    states: torch.Tensor
    """[M, D], h where each code was chosen"""
    actions: torch.Tensor
    """[M] int64"""
    rewards: torch.Tensor
    """[M] float32: 0 but at a rollout's last code"""
    support: torch.Tensor
    """[M, N] bool, the codes that the policy may take there"""
    last: torch.Tensor
    """[M] bool, the last code of its rollout; otherwise the next row is what followed"""
    rollouts: torch.Tensor
    """[M] int64, row of the batch"""


def transitions(
    model: LatentActionLM, states: torch.Tensor, batch: RolloutBatch, rewards: torch.Tensor, share: float
) -> Transitions:
    """The choices of a batch from h [B, T - 1, D] at the positions fed; ``rewards`` [B]; ``share`` as in
    ``supported``."""
    starts = model.spans(batch.response_mask[:, 1:]).starts
    rows = torch.arange(len(starts), device=starts.device)[:, None].expand(starts.shape)[starts]
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    return Transitions(
        states=states[starts],
        actions=batch.actions[:, 1:][starts],
        rewards=torch.where(last, rewards[rows].float(), 0.0),
        support=supported(model.policy.logits_at(states, starts), share),
        last=last,
        rollouts=rows,
    )


class QLearner:
    """A head, its slowly following copy, and the optimiser; ``bounds``: least and largest reward of a rollout."""

    def __init__(self, head: QHead, settings: QSettings, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        self.head, self.settings, self.bounds = head.train(), settings, bounds
        self.target = copy.deepcopy(head).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=0.01)
        self.updates = 0

    def update(self, batch: Transitions) -> Metrics:
        """One step on a batch; every ``target_every`` steps the target network is copied.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        q = self.head(batch.states)
        # What follows a choice is the next row; after a rollout's last one nothing does, and ``last`` says so.
        allowed = q.detach().masked_fill(~batch.support, float("-inf"))
        following, judged = allowed.roll(-1, 0), self.target(batch.states).clamp(*self.bounds).roll(-1, 0)
        targets = double_dqn_targets(batch.rewards, batch.last, following, judged, self.settings.discount)
        loss, metrics = q_loss(q, batch.actions, targets, positions=float(len(q)))
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the Q head's loss is {float(loss)} after {self.updates} updates: lower learning_rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimizer.step()
        self.updates += 1
        if self.updates % self.settings.target_every == 0:
            self.target.load_state_dict(self.head.state_dict())
        return metrics | {"loss": loss.detach()}
