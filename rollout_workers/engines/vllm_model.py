"""The latent-action model as vLLM sees it: a Llama whose next token is that of a code, chosen by policy blocks with
their own cache.

Imported only where vLLM is installed (``docs/vllm.md``). It uses vLLM's model-side interfaces, which move: the version
is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from latent_control.config import LatentActionConfig
from latent_control.merge import Merge
from latent_control.policies.mlp import MlpPolicy
from latent_control.pretrained import WEIGHTS, read_shape

Choose = Callable[[torch.Tensor], torch.Tensor]
"""Policy logits [M, N] of the rows of a step -> codes [M]."""

# vLLM joins these of a block's weights: (our part, its part, which share).
_JOINED = (
    ("q_proj", "qkv_proj", "q"),
    ("k_proj", "qkv_proj", "k"),
    ("v_proj", "qkv_proj", "v"),
    ("gate_proj", "gate_up_proj", 0),
    ("up_proj", "gate_up_proj", 1),
)


class PolicyBlocks(nn.Module):
    """The latent policy: decoder blocks, final norm, head [N, D]."""

    def __init__(self, config: VllmConfig, shape: LatentActionConfig) -> None:
        super().__init__()
        base = config.model_config.hf_config
        # The numbers continue the base's: vLLM tells layers' caches apart by them.
        first = base.num_hidden_layers
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(vllm_config=config, prefix=f"policy.layers.{first + number}")
            for number in range(shape.policy_layers)
        )
        self.norm = RMSNorm(base.hidden_size, eps=base.rms_norm_eps)
        self.head = nn.Linear(base.hidden_size, shape.num_actions, bias=False)
        for module in self.modules():
            if isinstance(module, LinearBase):
                # On CPUs vLLM packs weights once and for all; these change with every policy version.
                module._cpu_skip_gemm_dispatch = True

    def forward(self, positions: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, D] before the head from the states [T, D] the policy reads."""
        # vLLM's norms add in place, and the caller still needs the states.
        x, residual = states.clone(), None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        return self.norm(x, residual)[0]

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the weights of a ``latent_control.decoder_stack.DecoderStack``'s state, in place."""
        own = dict(self.named_parameters())
        for name, tensor in tensors.items():
            name = name.removeprefix("decoder.")
            for part, joined, share in _JOINED:
                if f".{part}." in name:
                    parameter = own[name.replace(part, joined)]
                    parameter.weight_loader(parameter, tensor.to(parameter.dtype), share)
                    break
            else:
                own[name].copy_(tensor)


def load_policy(policy: PolicyBlocks | MlpPolicy, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take the weights of a latent policy's state, in place."""
    if isinstance(policy, MlpPolicy):
        policy.load_state_dict(dict(tensors))
    else:
        policy.load(tensors)


class LatentLlama(LlamaForCausalLM):
    """Made by vLLM from the base LM's folder; ``hf_overrides`` must name the checkpoint as ``latent_checkpoint``."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.checkpoint = Path(config.latent_checkpoint)
        self.shape = read_shape(self.checkpoint)
        width = config.hidden_size
        self.policy: PolicyBlocks | MlpPolicy
        if self.shape.policy_kind == "mlp":
            self.policy = MlpPolicy(
                width, self.shape.num_actions, layers=self.shape.policy_layers, width=self.shape.policy_width
            )
        else:
            self.policy = PolicyBlocks(vllm_config, self.shape)
        self.merge = Merge(
            width, self.shape.merge_size or config.intermediate_size, self.shape.merge_layers, identity_start=False
        )
        self.codebook = nn.Parameter(torch.empty(self.shape.num_actions, width))
        self.table: Any = None
        self.choose: Choose = lambda logits: logits.argmax(-1)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Base's final states and the policy's hidden states side by side, [T, 2D]; of an MLP policy the former alone,
        [T, D]."""
        x = self.model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual: torch.Tensor | None = None
        late, late_at = x, len(self.model.layers) - self.shape.policy_layers
        for number, layer in enumerate(self.model.layers):
            if number == late_at:
                late = x if residual is None else x + residual
            x, residual = layer(positions, x, residual)
        final = self.model.norm(x, residual)[0]
        if isinstance(self.policy, MlpPolicy):
            return final
        return torch.cat([final, self.policy(positions, late if self.shape.policy_state == "late" else final)], -1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Token logits [M, V] under the codes that ``choose`` picks for these rows, from what ``forward`` gave."""
        if isinstance(self.policy, MlpPolicy):
            final, logits = hidden_states, self.policy(hidden_states)
        else:
            final, hidden = hidden_states.chunk(2, -1)
            logits = self.policy.head(hidden)
        if self.table is None:
            self.table = self.merge.table(self.codebook)
        merged = self.merge.lookup(final, self.choose(logits), self.table)
        if self.shape.head == "official":
            merged = self.model.norm(merged) - final
        return super().compute_logits(merged)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The base's from vLLM's loader, the rest from the checkpoint."""
        loaded = super().load_weights(weights)
        with safe_open(self.checkpoint / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        load_policy(
            self.policy,
            {name.removeprefix("policy."): tensor for name, tensor in tensors.items() if name.startswith("policy.")},
        )
        own = dict(self.named_parameters())
        for name in tensors.keys() & own.keys() - {name for name in own if name.startswith("policy.")}:
            own[name].data.copy_(tensors[name])
        return loaded | {name for name in own if name.startswith(("policy.", "merge.", "codebook"))}
