"""Policies over tokens, the baselines of latent actions (method.md 4): the base's last blocks, low-rank adapters of
them, steering vectors, blocks added to the base, an MLP on its final state, or all of it.

Before training each of them *is* the base LM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from latent_control.base_lm import BaseLM
from latent_control.decoder_stack import DecoderStack, decoder_blocks
from latent_control.decoding.action_decoder import ActionDecoder, base_actor
from latent_control.policies.mlp import MlpPolicy

Trains = Literal["last_blocks", "steering", "added_blocks", "mlp", "all"]

# What the architectures call the layers through which a block adds to its input: attention's and the MLP's last ones.
OUTPUTS = {"o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "fc_out", "dense_4h_to_h"}


class LanguageHead(nn.Linear):
    """A copy of a base LM's language head, with what the architecture does to its output."""

    def __init__(self, base: BaseLM) -> None:
        head = base.lm.get_output_embeddings()
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None)
        self.rule = base.head_rule
        self.load_state_dict(head.state_dict())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of states [..., D]."""
        return self.rule(super().forward(states))


class ShiftMlp(nn.Module):
    """An MLP on the base's final state that shifts that state before the base's own head, the twin over tokens of a
    latent ``MlpPolicy``; the shift is 0 at the start."""

    stateless = True

    def __init__(self, base: BaseLM, layers: int) -> None:
        super().__init__()
        self.state_width = base.width
        self.shift = MlpPolicy(base.width, base.width, layers=layers)
        nn.init.zeros_(self.shift.head.weight)
        self.head = LanguageHead(base)
        self.head.requires_grad_(False)

    def trainable(self) -> list[nn.Parameter]:
        """The MLP's parameters."""
        return list(self.shift.parameters())

    def hidden(self, states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[..., D] -> [..., D] before the head; there is nothing to mask."""
        states = states.to(self.head.weight.dtype)
        shifted: torch.Tensor = states + self.shift(states)
        return shifted

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [..., V] of states [..., D]."""
        logits: torch.Tensor = self.head(self.hidden(states))
        return logits

    def logits_at(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[M, V] at the positions ``mask`` [B, T] of states [B, T, D]."""
        return self(states[mask])


class WholeModel(nn.Module):
    """The whole base LM as a policy: it reads tokens, there are no features of anything frozen."""

    stateless = False

    def __init__(self, base: BaseLM) -> None:
        super().__init__()
        self.base = base.requires_grad_(True)

    def trainable(self) -> list[nn.Parameter]:
        """Every parameter of the base LM."""
        return list(self.base.parameters())

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """States [B, T, D] before the head, of token ids [B, T]."""
        final = self.base.features(tokens).final
        assert final is not None
        return final

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of states [..., D]."""
        return self.base.logits(states)

    def logits_at(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[M, V] at the positions ``mask`` [B, T] of token ids [B, T]."""
        return self.head(self.hidden(tokens)[mask])


TokenPolicy: TypeAlias = DecoderStack | ShiftMlp | WholeModel


def token_policy(lm: PreTrainedModel, trains: Trains, blocks: int) -> tuple[BaseLM, TokenPolicy]:
    """The part of ``lm`` that supplies features and the policy on them; together, exactly ``lm``. ``blocks`` of it, or
    layers of the MLP.

    Raises:
        ValueError: ``lm`` has too few blocks, or blocks that cannot be added without changing it.
    """
    if trains == "all":
        base = BaseLM(lm)
        return base, WholeModel(base)
    if trains in ("added_blocks", "mlp"):
        base = BaseLM(lm)
        return base, ShiftMlp(base, blocks) if trains == "mlp" else _with_head(added_blocks(base, blocks), base)
    base = BaseLM(lm, blocks)
    stack = DecoderStack(base.decoder, blocks, 1)
    stack.start_from(base.decoder)
    return base, _with_head(_steered(stack) if trains == "steering" else stack, base)


def _steered(stack: DecoderStack) -> DecoderStack:
    """``stack``, of which nothing is trained but a bias on what attention and MLP of each block add to the residual
    stream: steering vectors, 0 at the start where the architecture has no such bias."""
    stack.requires_grad_(False)
    for layer in _last_layers(decoder_blocks(stack.decoder)[1]):
        if layer.bias is None:
            layer.register_parameter("bias", nn.Parameter(layer.weight.new_zeros(len(layer.weight))))
        layer.bias.requires_grad_(True)
    return stack


def _with_head(stack: DecoderStack, base: BaseLM) -> DecoderStack:
    """``stack`` under the base's own language head, frozen."""
    stack.head = LanguageHead(base)
    stack.head.requires_grad_(False)
    return stack


def added_blocks(base: BaseLM, blocks: int) -> DecoderStack:
    """New blocks on the base's final state that pass it on as it is until trained: nothing leaves their last layers,
    nothing is normed.

    Raises: ValueError: the architecture's blocks do not allow that (they norm what they add to, or name their layers
        otherwise).
    """
    stack = DecoderStack(base.decoder, blocks, 1)
    name, layers = decoder_blocks(stack.decoder)
    for layer in _last_layers(layers):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    for child_name, child in list(stack.decoder.named_children()):
        if child_name != name and not isinstance(child, nn.Embedding) and any(True for _ in child.parameters()):
            setattr(stack.decoder, child_name, nn.Identity())  # the final norm
    state = torch.linspace(-1, 1, 3 * base.width).view(1, 3, base.width)
    with torch.no_grad():
        if not torch.equal(stack.hidden(state), state):
            raise ValueError(
                f"blocks cannot be added to {type(base.lm).__name__} without changing what it says: set "
                "improve.token_trains: last_blocks"
            )
    return stack


def _last_layers(layers: nn.ModuleList) -> Iterator[nn.Module]:
    return (module for path, module in layers.named_modules() if path.rsplit(".", 1)[-1] in OUTPUTS)


def token_actor(base: BaseLM, policy: TokenPolicy) -> ActionDecoder:
    """How a policy over tokens acts on what ``base`` supplies: an action is a token."""
    if isinstance(policy, WholeModel):
        return base_actor(policy.base)
    if isinstance(policy, ShiftMlp):
        return ActionDecoder(stack=None, reads="final", head=policy, emit=lambda _, actions: actions)
    reads = "late" if base.late_blocks else "final"
    return ActionDecoder(stack=policy, reads=reads, head=policy.head, emit=lambda _, actions: actions)
