"""LatentActionLM: a base LM with a codebook of latent actions, its inverse dynamics model, world model and latent
policy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from latent_control.base_lm import BaseLM
from latent_control.config import LatentActionConfig, merge_width
from latent_control.decoder_stack import DecoderStack
from latent_control.decoding.action_decoder import ActionDecoder, base_actor
from latent_control.decoding.generate import generate
from latent_control.decoding.guide import Allowed, Codes, make_guide
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.merge import Merge
from latent_control.notebook_views import count, table
from latent_control.policies.bank import PolicyBank
from latent_control.policies.latent import latent_policy
from latent_control.policies.mlp import MlpPolicy
from latent_control.pretrained import PretrainedMixin
from latent_control.records import Features, Generation
from latent_control.spans import Spans, lay_spans


class LatentActionLM(PretrainedMixin):
    """A decoder-only LM controlled by ``num_actions`` latent actions.

    One method per arrow of the method's figure::

        tokens -> features -> inverse_dynamics_logits -> label_actions     (training: sees one token ahead)
                           -> policy_logits                                (what RL updates)
                  features + actions -> world_logits                       (the language world model)
    """

    def __init__(self, lm: PreTrainedModel, config: LatentActionConfig, *, inverse_dynamics: bool = True) -> None:
        super().__init__()
        self.config = config
        self.base = BaseLM(lm, config.late_blocks)
        if config.head == "official" and not hasattr(self.base.decoder, "norm"):
            raise ValueError(
                "head='official' is the published code's, for Llama-like bases, not "
                f"{type(lm).__name__}: use 'residual'"
            )
        self.codebook = nn.Parameter(torch.randn(config.num_actions, self.base.width) * 0.5)
        self.merge = Merge(
            self.base.width,
            config.merge_size or merge_width(lm),
            config.merge_layers,
            identity_start=config.head == "residual",
        )
        self.policy = latent_policy(self.base.decoder, config)
        self.inverse_dynamics = (
            DecoderStack(self.base.decoder, config.inverse_dynamics_layers, config.num_actions)
            if inverse_dynamics
            else None
        )
        self.base_source: str | None = None
        self.to(self.base.lm.device)

    # -- the arrows of the figure ------------------------------------------------------------------------------------

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Features:
        """One base pass over ``input_ids`` [B, T] (padding on either side, marked by ``attention_mask`` [B, T])."""
        return self.base.features(input_ids, attention_mask)

    def inverse_dynamics_logits(self, features: Features, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """u [B, T, N], unshifted: the action taken at t is read at t + 1.

        Raises:
            ValueError: the model was exported without its inverse dynamics model.
        """
        if self.inverse_dynamics is None:
            raise ValueError(
                "this model was exported without its inverse dynamics model: load the training "
                "checkpoint to label actions"
            )
        return self.inverse_dynamics(features.read(self.config.inverse_dynamics_reads), attention_mask)

    def label_actions(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """a [B, T-1]: a_t = argmax of u at t + 1, the code that explains x_{t+1} (spans are laid from each row's first
        token)."""
        logits = self.inverse_dynamics_logits(self.features(input_ids, attention_mask), attention_mask)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.spans(real.bool()[:, :-1] & real.bool()[:, 1:]).labels(logits).argmax(-1)

    def spans(self, mask: torch.Tensor) -> Spans:
        """Where codes begin and end, given which positions [B, T-1] produce response tokens."""
        return lay_spans(mask, self.config.span, self.config.look_ahead)

    def policy_logits(self, features: Features, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """pi [B, T, N], from the prefix alone."""
        return self.policy(features.read(self.config.policy_state), attention_mask)

    def world_logits(self, features: Features, actions: torch.Tensor) -> torch.Tensor:
        """log p(x_{t+1} | x_{1:t}, a_t) up to a constant, [B, T, V], for codes ``actions`` [B, T]."""
        state = features.read("final")
        return self.head(
            state, self.merge.lookup(state.to(self.codebook.dtype), actions, self.merge.table(self.codebook))
        )

    def world_logits_from_codes(self, final: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """``world_logits`` [..., V] for code vectors [..., D] (soft codes while training)."""
        return self.head(final, self.merge(final.to(self.codebook.dtype), codes))

    def world_logits_of_all(self, final: torch.Tensor) -> torch.Tensor:
        """World logits of every code at once: final [M, D] -> [M, N, V]."""
        rows, count = len(final), self.config.num_actions
        states = final[:, None].expand(rows, count, -1)
        actions = torch.arange(count, device=final.device).expand(rows, count)
        return self.head(
            states, self.merge.lookup(states.to(self.codebook.dtype), actions, self.merge.table(self.codebook))
        )

    def head(self, final: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """Next-token logits [..., V] of merged states [..., D], by the configured variant."""
        merged = merged.to(self.base.dtype)
        if self.config.head == "official":
            # The published code norms the merged state and takes the features off again.
            merged = self.base.decoder.norm(merged) - final
        return self.base.logits(merged)

    # -- decoding ----------------------------------------------------------------------------------------------------

    def actor(self, level: str = "latent") -> ActionDecoder:
        """How ``generate`` acts: ``latent``, or ``base`` (the bare LM: token by token, no codes)."""
        if level not in ("latent", "base"):
            raise ValueError(f"level={level!r} must be 'latent' or 'base'")
        return latent_actor(self) if level == "latent" else base_actor(self.base)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        level: str = "latent",
        codes: Codes | None = None,
        allowed_codes: Allowed | None = None,
        **params: Any,
    ) -> Generation:
        """Sample codes (``temperature`` 0: take the most likely), emit their tokens, until the end token or the limit;
        with ``decode="token"`` choose tokens from the mixture over codes.

        Args:
            input_ids: prompts [B, P], padded on either side as ``attention_mask`` [B, P] says.
            level: ``latent``, or ``base`` for the bare LM.
            codes: force these codes, from the first token on; the policy chooses where they end or say ``None`` (-1).
            allowed_codes: the policy chooses among these codes only.
            params: fields of ``SamplingParams``: ``max_new_tokens``, ``temperature``, ``top_k``, ``seed``, ``repeats``
                (rollouts per prompt: outputs have B * repeats rows), ``row_seeds``, ``stop_token``, ``batch_size``,
                ``return_features``, ``watch``, ``decode``, ``mixture_codes``.

        Raises:
            ValueError: an argument is out of range.
        """
        if level != "latent" and (codes is not None or allowed_codes is not None):
            raise ValueError(f"codes and allowed_codes steer latent actions: level={level!r} has none")
        rows, shape = len(input_ids) * params.get("repeats", 1), self.config
        guide = make_guide(
            codes, allowed_codes, rows=rows, num_actions=shape.num_actions, span=shape.span, device=input_ids.device
        )
        return generate(self.base, self.actor(level), SamplingParams(guide=guide, **params), input_ids, attention_mask)

    def cast_modules(self, dtype: torch.dtype | None = None) -> LatentActionLM:
        """Put the new modules into ``dtype`` (default: the base's own) for inference; training keeps float32
        masters."""
        dtype = dtype or self.base.dtype
        for module in (self.merge, self.policy, self.inverse_dynamics):
            if module is not None:
                module.to(dtype)
        self.codebook.data = self.codebook.data.to(dtype)
        return self

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part."""
        parts: dict[str, Any] = {
            "base": self.base,
            "merge": self.merge,
            "policy": self.policy,
            "inverse_dynamics": self.inverse_dynamics,
        }
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
        return counts | {"codebook": self.codebook.numel()}

    def summary(self) -> list[tuple[str, str]]:
        """What the model is, in words: name and value of each part."""
        base, sizes = self.base.lm, self.parameter_counts()
        blocks = {"policy": self.config.policy_layers, "merge": self.config.merge_layers}
        if self.inverse_dynamics is not None:
            blocks["inverse_dynamics"] = self.config.inverse_dynamics_layers
        shape = f"{type(base).__name__}, {self.base.decoder.config.num_hidden_layers} blocks, width {self.base.width}"
        return [
            ("base LM", f"{self.base_source or 'bundled'}: {shape}, {count(sizes['base'])} parameters, frozen"),
            ("codes", f"{self.config.num_actions}, each for {self.config.span} token{'s' * (self.config.span > 1)}"),
            *(
                (name.replace("_", " "), f"{number} blocks, {count(sizes[name])} parameters")
                for name, number in blocks.items()
            ),
            ("head", self.config.head),
        ] + ([] if self.inverse_dynamics is not None else [("inverse dynamics", "none: made for production")])

    def __repr__(self) -> str:
        return "LatentActionLM(\n" + "\n".join(f"  {name}: {value}" for name, value in self.summary()) + "\n)"

    def _repr_html_(self) -> str:
        return table("LatentActionLM", self.summary())


def latent_actor(model: LatentActionLM, bank: PolicyBank | None = None) -> ActionDecoder:
    """The policy (of ``bank``, where rows name theirs) picks a code; the world model emits that code's most likely
    token. The codes' share of the merge is tabulated."""
    table = model.merge.table(model.codebook)

    def world_logits(final: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return model.head(final, model.merge.lookup(final.to(model.codebook.dtype), actions, table))

    def emit(final: torch.Tensor | None, actions: torch.Tensor) -> torch.Tensor:
        assert final is not None
        return world_logits(final, actions).argmax(-1)

    policy = model.policy
    return ActionDecoder(
        stack=None if isinstance(policy, MlpPolicy) else policy,
        reads=model.config.policy_state,
        head=policy if isinstance(policy, MlpPolicy) else policy.head,
        emit=emit,
        world_logits=world_logits,
        span=model.config.span,
        bank=bank,
    )


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target) of logits [..., V] and targets [...], in float32."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
