"""LatentActionLM: a base LM with a codebook of latent actions, its inverse dynamics model, world model and latent
policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from latent_control.base_lm import BaseLM
from latent_control.bases.loading import BASE, load_model
from latent_control.decoding.action_decoder import Actor, base_actor, latent_actor
from latent_control.decoding.generate import generate
from latent_control.decoding.guide import Allowed, Codes, Watch, make_guide
from latent_control.merge import Merge
from latent_control.notebook_views import count, table
from latent_control.records import Features, Generation
from latent_control.spans import Spans, lay_spans
from latent_control.tower import Tower

Reads = Literal["late", "final"]


@dataclass(frozen=True, kw_only=True)
class LatentActionConfig:
    """Shape of the modules beside the base LM.

    ``LatentActionConfig(num_actions=64, inverse_dynamics_layers=4, merge_layers=2, policy_layers=8, ...)`` is the
    paper's.
    """

    num_actions: int = 64
    head: Literal["residual", "official"] = "residual"
    inverse_dynamics_layers: int = 2
    merge_layers: int = 2
    policy_layers: int = 2
    inverse_dynamics_reads: Reads = "late"
    policy_reads: Reads = "late"
    merge_size: int | None = None
    """Inner width of the merge blocks; ``None`` is the base's own MLP width."""
    span: int = 1
    """Tokens for which a code is held."""
    look_ahead: int | None = None
    """Tokens the inverse dynamics model sees from the beginning of a span on; ``None`` is ``span``."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r} must be one of {allowed}"
            for name, value, allowed in self._choices()
            if value not in allowed
        ]
        sizes = ("num_actions", "inverse_dynamics_layers", "merge_layers", "policy_layers", "span")
        problems += [
            f"{name}={value!r} must be a positive whole number"
            for name in sizes
            if not isinstance(value := getattr(self, name), int) or value < 1
        ]
        if self.merge_size is not None and (not isinstance(self.merge_size, int) or self.merge_size < 1):
            problems.append(
                f"merge_size={self.merge_size!r} must be a positive whole number, or None for the base's own MLP width"
            )
        if self.look_ahead is not None and (not isinstance(self.look_ahead, int) or self.look_ahead < self.span):
            problems.append(
                f"look_ahead={self.look_ahead!r} must be at least the span of {self.span} tokens that a "
                "code explains, or None"
            )
        if (
            self.inverse_dynamics_reads == self.policy_reads == "late"
            and self.inverse_dynamics_layers != self.policy_layers
        ):
            problems.append(
                f"inverse_dynamics_layers={self.inverse_dynamics_layers} and policy_layers={self.policy_layers} "
                "differ, but both read "
                "'late', which is one state that many blocks before the base's end: make them equal, or let one read "
                "'final'"
            )
        if problems:
            raise ValueError("; ".join(problems))

    def _choices(self) -> list[tuple[str, str, tuple[str, ...]]]:
        reads = ("late", "final")
        return [
            ("head", self.head, ("residual", "official")),
            ("inverse_dynamics_reads", self.inverse_dynamics_reads, reads),
            ("policy_reads", self.policy_reads, reads),
        ]

    @property
    def late_blocks(self) -> int:
        """How many blocks before the base's end the ``late`` state is taken; 0 when nothing reads it."""
        if self.policy_reads == "late":
            return self.policy_layers
        return self.inverse_dynamics_layers if self.inverse_dynamics_reads == "late" else 0


def load_base(
    base: str | Path | PreTrainedModel, *, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A frozen base LM from a folder, a hub id or a loaded model. Safetensors only: other weight files are pickles,
    which run code.

    Raises: ValueError: the folder does not exist or holds no causal LM, or not all of its tensors and no others, or a
        tokenizer with
            more tokens than the embedding has rows; said from the files, before a weight is read.
    """
    lm = (
        base
        if isinstance(base, PreTrainedModel)
        else load_model(base, BASE, dtype=dtype, trust_remote_code=trust_remote_code)
    )
    return lm.eval().requires_grad_(False)


def merge_width(lm: PreTrainedModel) -> int:
    """The base's MLP width, whatever its config calls it."""
    config = lm.get_decoder().config
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 4 * int(config.hidden_size)


class LatentActionLM(nn.Module):
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
        self.policy = Tower(self.base.decoder, config.policy_layers, config.num_actions)
        self.inverse_dynamics = (
            Tower(self.base.decoder, config.inverse_dynamics_layers, config.num_actions) if inverse_dynamics else None
        )
        self.base_source: str | None = None
        self.to(self.base.lm.device)

    @classmethod
    def from_base(
        cls,
        base: str | Path | PreTrainedModel,
        *,
        num_actions: int = 64,
        head: Literal["residual", "official"] = "residual",
        inverse_dynamics_layers: int = 2,
        merge_layers: int = 2,
        policy_layers: int = 2,
        inverse_dynamics_reads: Reads = "late",
        policy_reads: Reads = "late",
        merge_size: int | None = None,
        span: int = 1,
        look_ahead: int | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        seed: int | None = None,
    ) -> LatentActionLM:
        """New modules beside a frozen base LM (a folder, a hub id or a loaded model).

        Blocks that read ``late`` start as copies of the base's last blocks. ``seed`` makes the new weights reproducible
        without touching torch's global stream.

        Raises:
            ValueError: a setting is out of range, or there is no whole causal LM at ``base`` (as ``load_base``).
        """
        config = LatentActionConfig(
            num_actions=num_actions,
            head=head,
            inverse_dynamics_layers=inverse_dynamics_layers,
            merge_layers=merge_layers,
            policy_layers=policy_layers,
            inverse_dynamics_reads=inverse_dynamics_reads,
            policy_reads=policy_reads,
            merge_size=merge_size,
            span=span,
            look_ahead=look_ahead,
        )
        lm = load_base(base, dtype=dtype, trust_remote_code=trust_remote_code)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            model = cls(lm, config)
        model.base_source = lm.name_or_path if isinstance(base, PreTrainedModel) else str(base)
        if config.policy_reads == "late":
            model.policy.start_from(model.base.decoder)
        if config.inverse_dynamics_reads == "late" and model.inverse_dynamics is not None:
            model.inverse_dynamics.start_from(model.base.decoder)
        return model

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
        return self.policy(features.read(self.config.policy_reads), attention_mask)

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

    def actor(self, level: str = "latent") -> Actor:
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
        max_new_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        stop_token: int | list[int] | None = None,
        level: str = "latent",
        repeats: int = 1,
        row_seeds: Sequence[int] | None = None,
        return_features: bool = False,
        codes: Codes | None = None,
        allowed_codes: Allowed | None = None,
        watch: Watch | None = None,
    ) -> Generation:
        """Sample codes (``temperature`` 0: take the most likely), emit their tokens, until the end token or the limit.

        Args:
            input_ids: prompts [B, P], padded on either side as ``attention_mask`` [B, P] says.
            max_new_tokens: one number, or one per output row.
            top_k: sample among the k most likely codes.
            seed: row r draws from a stream made of (seed, r) alone; ``None``: one from torch's global stream.
            batch_size: rows decoded at once, ``None`` is all; ``row_seeds``: a stream per output row, not ``seed``.
            stop_token: end token or tokens; ``None`` is the base's (all of them), -1 none at all.
            level: ``latent``, or ``base`` for the bare LM.
            return_features: also return the states that the policy read.
            repeats: rollouts per prompt, which share its prefill; outputs have B * repeats rows.
            codes: force these codes, from the first token on; the policy chooses where they end or say ``None`` (-1).
            allowed_codes: the policy chooses among these codes only; ``watch``: called at every step, may end rows.

        Raises:
            ValueError: an argument is out of range.
        """
        if level != "latent" and (codes is not None or allowed_codes is not None):
            raise ValueError(f"codes and allowed_codes steer latent actions: level={level!r} has none")
        rows, shape = len(input_ids) * repeats, self.config
        guide = make_guide(
            codes, allowed_codes, rows=rows, num_actions=shape.num_actions, span=shape.span, device=input_ids.device
        )
        return generate(
            self.base,
            self.actor(level),
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            batch_size=batch_size,
            stop_token=stop_token,
            repeats=repeats,
            row_seeds=row_seeds,
            return_features=return_features,
            guide=guide,
            watch=watch,
        )

    # -- persistence -------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, bundle_base: bool = False, inverse_dynamics: bool = True) -> Path:
        """Save the new modules (safetensors + JSON); the base by reference with its hash, or bundled.

        ``inverse_dynamics=False`` leaves the inverse dynamics model out (production).
        """
        from latent_control.pretrained import save

        return save(self, Path(folder), bundle_base=bundle_base, inverse_dynamics=inverse_dynamics)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        base: str | Path | PreTrainedModel | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
    ) -> LatentActionLM:
        """Load what ``save_pretrained`` wrote, or a published CoLA checkpoint (its config has ``num_code``).

        Args:
            base: where the base LM lies now, when it moved since saving; its hash must agree.
            dtype: of the base LM; the new modules stay in float32 (see ``cast_modules``).

        Raises:
            ValueError: no checkpoint in ``folder``, a tensor missing or misshapen, or the base's hash differs.
        """
        from latent_control.pretrained import load

        return load(cls, Path(folder), base=base, dtype=dtype, trust_remote_code=trust_remote_code)

    def cast_modules(self, dtype: torch.dtype | None = None) -> LatentActionLM:
        """Put the new modules into ``dtype`` (default: the base's own) for inference; training keeps float32
        masters."""
        dtype = dtype or self.base.dtype
        for module in (self.merge, self.policy, self.inverse_dynamics):
            if module is not None:
                module.to(dtype)
        self.codebook.data = self.codebook.data.to(dtype)
        return self

    def new_modules(self) -> dict[str, torch.Tensor]:
        """Every tensor beside the base LM, by name."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("base.")}

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
        shape = f"{type(base).__name__}, {base.get_decoder().config.num_hidden_layers} blocks, width {self.base.width}"
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

    def config_dict(self) -> dict[str, Any]:
        """The shape of the new modules as plain data."""
        return dataclasses.asdict(self.config)


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target) of logits [..., V] and targets [...], in float32."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
