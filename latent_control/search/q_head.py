"""The Q head: what reward to expect of each code, read from the state the policy reads; learned by double DQN.

Q(h, a) of N codes from h, a hidden state of the base ("late" or "final", as the policy's config says; method.md,
section 5). h belongs to the frozen base, so one head serves every policy on the same base and codebook, and the
features of a stored rollout are computed once.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from latent_control.losses import Metrics
from latent_control.tensor_files import as_readable_as, read_weights

SHAPE, WEIGHTS = "q_head.json", "q_head.safetensors"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class QShape:
    """What a Q head is made for.

    ``QShape(width=128, hidden=256, num_actions=64, span=1, reads="late", late_blocks=2, support=0.1, world_hash="5f..",
    base_hash="0a..")``
    """

    width: int
    """D, of the base"""
    hidden: int
    """Inner width of the two layers; 0 is one linear layer."""
    num_actions: int
    span: int
    reads: str
    """"late" or "final", of the base's states"""
    late_blocks: int
    """Where "late" is"""
    support: float
    """A code counts in max_a Q where the policy gives it at least this share of the likeliest code's probability."""
    world_hash: str
    """Of codebook and merge module: with others the codes mean something else."""
    base_hash: str
    """Of the base, whose state it reads."""


class QHead(nn.Module):
    """Norm, linear, SiLU, linear: h [..., D] -> Q [..., N]. The last layer starts at zero, so every value starts at
    0.5."""

    def __init__(self, shape: QShape) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.width)
        self.inner = nn.Linear(shape.width, shape.hidden) if shape.hidden else None
        self.out = nn.Linear(shape.hidden or shape.width, shape.num_actions)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, 0.5)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Q of every code, in float32."""
        x = self.norm(h.float())
        return self.out(x if self.inner is None else F.silu(self.inner(x)))


def supported(policy_logits: torch.Tensor, share: float) -> torch.Tensor:
    """[..., N] bool: codes at least ``share`` as likely as the likeliest, of policy logits [..., N].

    Of other codes the buffer holds next to nothing, and a maximum over them feeds on its own errors (Fujimoto et al.,
    2019, arXiv 1910.01708, discrete BCQ, with the policy in place of a model of the behaviour).
    """
    return policy_logits >= policy_logits.max(-1, keepdim=True).values + math.log(share)


def best_supported(q: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """max_a Q [...] over the codes [..., N] in ``support``."""
    return q.masked_fill(~support, float("-inf")).max(-1).values


def double_dqn_targets(
    rewards: torch.Tensor, last: torch.Tensor, online_next: torch.Tensor, target_next: torch.Tensor, discount: float
) -> torch.Tensor:
    """r + discount * Q_target(h', argmax_a Q_online(h', a)), and r alone where the episode ends (van Hasselt et al.,
    2016).

    Args:
        rewards: [M], of each transition.
        last: [M] bool, whether it ends its rollout.
        online_next, target_next: [M, N], both networks at the state that follows; anything where ``last``.
    """
    best = online_next.argmax(-1, keepdim=True)
    following = target_next.gather(-1, best)[:, 0]
    return rewards + discount * torch.where(last, torch.zeros_like(following), following)


def q_loss(
    q: torch.Tensor, actions: torch.Tensor, targets: torch.Tensor, *, positions: float
) -> tuple[torch.Tensor, Metrics]:
    """Half the squared error of Q [M, N] at ``actions`` [M] to ``targets`` [M], summed and divided by ``positions``."""
    taken = q.gather(-1, actions[:, None])[:, 0]
    error = taken - targets.detach()
    metrics = {"td_error": error.detach().abs().sum() / positions, "q_taken": taken.detach().sum() / positions}
    return 0.5 * error.square().sum() / positions, metrics | {"q_max": q.detach().max(-1).values.sum() / positions}


def save_q_head(head: QHead, folder: Path) -> None:
    """Weights as safetensors, shape as JSON."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}, folder / WEIGHTS
    )
    (folder / SHAPE).write_text(json.dumps({"format": FORMAT, "shape": asdict(head.shape)}, indent=1))
    as_readable_as(folder / SHAPE)


def read_q_shape(folder: Path) -> QShape:
    """The shape of a saved Q head.

    Raises:
        ValueError: there is none in ``folder``, or it is of another format.
    """
    try:
        saved = json.loads((folder / SHAPE).read_text())
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']!r}, this version reads {FORMAT}")
        return QShape(**saved["shape"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"no Q head in {folder}: {error}; train one with latent-control train-q RUN") from error


def load_q_head(folder: Path) -> QHead:
    """What ``save_q_head`` wrote.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    head = QHead(read_q_shape(folder))
    tensors = read_weights(folder / WEIGHTS)
    wanted = head.state_dict()
    wrong = sorted(name for name in wanted.keys() | tensors.keys() if name not in wanted or name not in tensors)
    wrong += sorted(name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape)
    if wrong:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit {SHAPE} beside it ({', '.join(wrong)}): train the Q head again"
        )
    head.load_state_dict(tensors)
    return head.eval().requires_grad_(False)
