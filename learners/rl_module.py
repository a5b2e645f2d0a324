"""The policy as an RLModule: what RL updates, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.utils.typing import StateDict

from latent_control.actors import token_policy
from latent_control.base import BaseLM
from latent_control.model import load_base
from latent_control.persistence import load_policy
from latent_control.tower import Tower


def build_policy(*, level: str, checkpoint: str, token_blocks: int, trust_remote_code: bool) -> Tower:
    """The policy as the earlier stages left it: the cloned latent policy of a latent-action ``checkpoint``, or, at level
    "token", the last blocks of the base LM in folder ``checkpoint``."""
    if level == "latent":
        return load_policy(checkpoint, trust_remote_code=trust_remote_code)
    lm = load_base(checkpoint, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return token_policy(BaseLM(lm, token_blocks))


class PolicyModule(TorchRLModule):
    """``model_config``: the arguments of ``build_policy``.

    Its state is the trained parameters alone, as float32 arrays: frozen heads neither travel nor are stored.
    """

    def setup(self) -> None:
        """Build the policy."""
        self.policy = build_policy(**self.model_config)
        trained = {id(p) for p in self.policy.trainable() if p.requires_grad}
        for parameter in self.policy.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that RL changes, by name."""
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    def get_state(self, *_: Any, **__: Any) -> StateDict:
        """``{name: float32 array}`` of the trained parameters."""
        return {name: p.detach().float().cpu().numpy().copy() for name, p in self.trained().items()}

    def set_state(self, state: StateDict) -> None:
        """Load what ``get_state`` gave.

        Raises:
            ValueError: names differ from the trained parameters'.
        """
        trained = self.trained()
        if state.keys() != trained.keys():
            raise ValueError(f"policy weights do not fit: {sorted(state.keys() ^ trained.keys())[:5]} are missing or unknown")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(torch.from_numpy(np.asarray(state[name]).copy()))

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        """Logits at the loss positions only, [M, actions]: ``features`` [B, T, D] right padded, ``loss_mask`` [B, T]."""
        hidden = self.policy.hidden(batch["features"])[batch[Columns.LOSS_MASK]]
        return {Columns.ACTION_DIST_INPUTS: self.policy.head(hidden)}

    _forward = _forward_train
