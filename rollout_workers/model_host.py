"""What a rollout worker hosts: base LM, world model, policy and tokenizer, loaded once per actor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from configs.schema import Reward as RewardSettings
from configs.schema import RolloutConfig as RolloutSettings
from configs.schema import TaskConfig as TaskSettings
from latent_control.base_lm import BaseLM, load_base
from latent_control.decoding.action_decoder import ActionDecoder, base_actor
from latent_control.model import LatentActionLM, latent_actor
from latent_control.policies.bank import PolicyBank
from latent_control.policies.latent import LatentPolicy
from latent_control.policies.mlp import MlpPolicy
from latent_control.pretrained import tokenizer_path, weights_hash, world_hash
from latent_control.tensor_files import read_weights, require_tensors
from latent_control.text import load_tokenizer
from latent_control.token_policy import ShiftMlp, TokenPolicy, WholeModel, token_actor, token_policy
from rollout_workers.rollouts import HostSpec


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Everything a worker needs besides a model; plain data, shipped once."""

    host: HostSpec | None
    """The model requests are for by default; ``None`` for a worker whose requests all name theirs (evaluation)."""
    policy_dtype: str
    """"float32" or "bfloat16"."""
    task: TaskSettings
    rollout: RolloutSettings
    reward: RewardSettings = field(default_factory=RewardSettings)


@dataclass(frozen=True, kw_only=True)
class MemberSettings:
    """One of the policies that a worker samples for; plain data, which travels with each of its requests, so that a
    worker that was started again, or late, knows all that there is to know."""

    name: str
    worker: WorkerSettings
    """Its task, verifier and reward; the worker's own are not read."""
    module: Mapping[str, Any]
    """``model_config`` of its RLModule: which checkpoint it starts from, and what is trained of it."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A loaded model as the worker uses it."""

    level: str
    base: BaseLM
    model: LatentActionLM | None
    """``None`` at the levels without latent actions."""
    policy: LatentPolicy | TokenPolicy | None
    tokenizer: PreTrainedTokenizerBase
    world_hash: str = ""
    codebook_hash: str = ""

    def actor(self, bank: PolicyBank | None = None) -> ActionDecoder:
        """How this host acts; rows that name a member of ``bank`` act as that."""
        if self.model is not None:
            assert not isinstance(self.policy, ShiftMlp | WholeModel | None)
            self.model.policy = self.policy
            return latent_actor(self.model, bank)
        if self.policy is None:
            return base_actor(self.base)
        assert not isinstance(self.policy, MlpPolicy), "a policy over tokens is made of blocks"
        return token_actor(self.base, self.policy)

    def steered_by(self, policy: LatentPolicy | TokenPolicy) -> Host:
        """This host with another policy; one that is a whole model replaces the base too."""
        return replace(self, policy=policy, base=policy.base if isinstance(policy, WholeModel) else self.base)


def _fill(policy: LatentPolicy | TokenPolicy, path: Path) -> None:
    """Load the trained tensors of a token-level policy: all of them, for the others are the base's."""
    tensors, trained = (
        read_weights(path),
        {id(parameter) for parameter in policy.trainable() if parameter.requires_grad},
    )
    wanted = {name: tuple(parameter.shape) for name, parameter in policy.named_parameters() if id(parameter) in trained}
    require_tensors(path, wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    policy.load_state_dict(tensors, strict=False)


def latent_host(model: LatentActionLM, tokenizer: PreTrainedTokenizerBase, policy_dtype: torch.dtype) -> Host:
    """A host of ``model``, changed for sampling: without inverse dynamics model, new modules in the base's dtype."""
    world, codebook = world_hash(model), weights_hash([("codebook", model.codebook)])
    model.hosted(policy_dtype)
    return Host(
        level="latent",
        base=model.base,
        model=model,
        policy=model.policy,
        tokenizer=tokenizer,
        world_hash=world,
        codebook_hash=codebook,
    )


def load_host(spec: HostSpec, device: torch.device, policy_dtype: torch.dtype) -> Host:
    """Load a model for sampling: without inverse dynamics model, the world model in the base's dtype.

    Raises:
        ValueError: there is no such checkpoint, or tensors of it are missing.
    """
    trust = spec.trust_remote_code
    tokenizer = load_tokenizer(
        tokenizer_path(spec.checkpoint) if spec.level == "latent" else spec.checkpoint, trust_remote_code=trust
    )
    if spec.level == "latent":
        model = LatentActionLM.from_pretrained(spec.checkpoint, dtype=spec.dtype, trust_remote_code=trust).to(device)
        return latent_host(model, tokenizer, policy_dtype)
    lm = load_base(spec.checkpoint, dtype=spec.dtype, trust_remote_code=trust)
    if spec.level == "base":
        return Host(level="base", base=BaseLM(lm).to(device), model=None, policy=None, tokenizer=tokenizer)
    base, tokens = token_policy(lm, spec.token_trains, spec.token_blocks)
    if spec.policy_file:
        _fill(tokens, Path(spec.policy_file))
    if base.late_blocks:
        base.drop_late_blocks()
    return Host(
        level="token", base=base.to(device), model=None, policy=tokens.to(device, policy_dtype), tokenizer=tokenizer
    )
