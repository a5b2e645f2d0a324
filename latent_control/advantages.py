"""Group advantages: what multiplies the score function. Rewards [P, G] of G rollouts per prompt -> advantages [P, G].

``valid`` [P, G] is False where the verifier failed: those rollouts get advantage 0 and stay out of every mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def group_mean(rewards: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the valid rollouts of each group, [P, 1]."""
    return (rewards * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)


def grpo(rewards: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(r - mean) / std within the group (Shao et al., 2024, DeepSeekMath), with the population std.

    Leaves out its length normalisation, which is the loss's choice (``loss_mean``).
    """
    centred = (rewards - group_mean(rewards, valid)) * valid
    std = (group_mean(centred**2, valid)).sqrt()
    return centred / (std + 1e-4)


def rloo(rewards: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """r minus the mean of the *other* rollouts (Kool et al., 2019; Ahmadian et al., 2024)."""
    count = valid.sum(1, keepdim=True)
    others = ((rewards * valid).sum(1, keepdim=True) - rewards) / (count - 1).clamp(min=1)
    return torch.where(count > 1, rewards - others, 0.0) * valid


ADVANTAGES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"grpo": grpo, "rloo": rloo}
