"""The latent policy that a config names: the base's own blocks, or an MLP on its final state."""

from __future__ import annotations

from transformers import PreTrainedModel

from latent_control.config import LatentActionConfig
from latent_control.decoder_stack import DecoderStack
from latent_control.policies.mlp import MlpPolicy

LatentPolicy = DecoderStack | MlpPolicy


def latent_policy(decoder: PreTrainedModel, config: LatentActionConfig) -> LatentPolicy:
    """A new policy over ``config.num_actions`` codes for the states of ``decoder``."""
    if config.policy_kind == "blocks":
        return DecoderStack(decoder, config.policy_layers, config.num_actions)
    return MlpPolicy(
        config.state_width(decoder.config.hidden_size),
        config.num_actions,
        layers=config.policy_layers,
        width=config.policy_width,
    )
