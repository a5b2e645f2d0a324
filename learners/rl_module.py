"""The policy as an RLModule: what RL updates, and nothing else."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.utils.typing import StateDict
from torch import nn

from latent_control.base_lm import load_base
from latent_control.decoder_stack import DecoderStack
from latent_control.policies.latent import LatentPolicy
from latent_control.pretrained import load_policy
from latent_control.token_policy import TokenPolicy, Trains, WholeModel, token_policy
from learners import low_rank
from learners.sharding import like, whole_arrays

CRITIC = "critic."
"""What the names of the critic's parameters begin with."""


def build_policy(
    *,
    level: str,
    checkpoint: str,
    token_trains: Trains,
    token_blocks: int,
    trust_remote_code: bool,
    trains: Literal["all", "head"] = "all",
) -> LatentPolicy | TokenPolicy:
    """The policy as the earlier stages left it, its untrained parameters frozen: the cloned latent policy of a
    latent-action ``checkpoint``, of which ``trains`` may leave the head alone, or, at level "token", a policy over
    tokens that is still the base LM in folder ``checkpoint``."""
    if level == "latent":
        policy = load_policy(checkpoint, trust_remote_code=trust_remote_code)
        if trains == "head":
            policy.requires_grad_(False).head.requires_grad_(True)
        return policy
    lm = load_base(checkpoint, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return token_policy(lm, token_trains, token_blocks)[1]


class Critic(nn.Module):
    """What is still to come, V, of a state the policy reads: a norm and one hidden layer, 0 everywhere before
    training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU())
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[M, D] -> [M]."""
        # The sum of one number: FSDP2 warns of views.
        return self.head(self.hidden(states.to(self.head.weight.dtype))).sum(-1)


class PolicyModule(TorchRLModule):
    """``model_config``: the arguments of ``build_policy``, ``critic``: whether the learner's copy has one, and
    ``adapter_rank``: that of the low-rank adapters by which the learner's copy is trained, or ``None``.

    Its state is the trained parameters alone, as float32 arrays: frozen heads neither travel nor are stored. Copies
    for inference have no adapters; their state is the merged blocks.
    """

    def setup(self) -> None:
        """Build the policy."""
        settings = dict(self.model_config)
        critic, rank = settings.pop("critic"), settings.pop("adapter_rank")
        self.policy = build_policy(**settings)
        self.adapted = rank is not None and not self.inference_only
        if self.adapted:
            assert isinstance(self.policy, DecoderStack)
            low_rank.adapt(self.policy, rank)
        trained = {id(p) for p in self.policy.trainable() if p.requires_grad}
        for parameter in self.policy.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        alone = isinstance(self.policy, WholeModel) or self.inference_only
        self.critic = Critic(self.policy.state_width) if critic and not alone else None

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that RL changes, by name."""
        critic = {} if self.critic is None else {f"{CRITIC}{name}": p for name, p in self.critic.named_parameters()}
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad} | critic

    def get_state(self, *_: Any, inference_only: bool = False, **__: Any) -> StateDict:
        """``{name: float32 array}`` of the trained parameters; ``inference_only`` leaves the critic out and merges
        adapters."""
        wanted: dict[str, torch.Tensor] = {
            name: p for name, p in self.trained().items() if not (inference_only and name.startswith(CRITIC))
        }
        if inference_only and self.adapted:
            assert isinstance(self.policy, DecoderStack)
            wanted = low_rank.merged(self.policy)
        return whole_arrays(wanted)

    def set_state(self, state: StateDict) -> None:
        """Load what ``get_state`` gave.

        Raises:
            ValueError: names differ from the trained parameters'.
        """
        trained = self.trained()
        if state.keys() != trained.keys():
            raise ValueError(
                f"policy weights do not fit: {sorted(state.keys() ^ trained.keys())[:5]} are missing or unknown"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(like(parameter, torch.from_numpy(np.asarray(state[name]).copy())))

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        """Logits at the loss positions only, [M, actions], and the critic's values [M]: ``features`` [B, T, D] right
        padded, ``loss_mask`` [B, T]."""
        mask = batch[Columns.LOSS_MASK]
        output = {Columns.ACTION_DIST_INPUTS: self.policy.logits_at(batch["features"], mask)}
        return output if self.critic is None else output | {Columns.VF_PREDS: self.critic(batch["features"][mask])}

    _forward = _forward_train
