"""The shape of the modules beside the base LM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from latent_control.decoder_stack import decoder_of

Reads = Literal["late", "final"]
PolicyReads = Literal["late", "final", "both"]


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
    policy_kind: Literal["blocks", "mlp"] = "blocks"
    """``blocks``: decoder blocks like the base's last ones; ``mlp``: a residual MLP of ``policy_layers`` layers on the
    base's final state."""
    policy_width: int | None = None
    """Inner width of an ``mlp`` policy; ``None`` is 256, or the base's width where that is less."""
    policy_reads: PolicyReads | None = None
    """``None`` is ``late`` for ``blocks``, ``final`` for ``mlp``, which may read ``both`` side by side, not
    ``late`` alone."""
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
        problems += [
            f"{name}={value!r} must be a positive whole number, or None for {default}"
            for name, default in (("merge_size", "the base's own MLP width"), ("policy_width", "the default"))
            if (value := getattr(self, name)) is not None and (not isinstance(value, int) or value < 1)
        ]
        problems += self._policy_problems()
        if self.look_ahead is not None and (not isinstance(self.look_ahead, int) or self.look_ahead < self.span):
            problems.append(
                f"look_ahead={self.look_ahead!r} must be at least the span of {self.span} tokens that a "
                "code explains, or None"
            )
        if (
            self.inverse_dynamics_reads == self.policy_state == "late"
            and self.inverse_dynamics_layers != self.policy_layers
        ):
            problems.append(
                f"inverse_dynamics_layers={self.inverse_dynamics_layers} and policy_layers={self.policy_layers} "
                "differ, but both read 'late', which is one state that many blocks before the base's end: make them "
                "equal, or let one read 'final'"
            )
        if problems:
            raise ValueError("; ".join(problems))

    def _policy_problems(self) -> list[str]:
        only = {"late": "blocks", "both": "mlp"}.get(str(self.policy_reads), self.policy_kind)
        if only != self.policy_kind and self.policy_kind in ("blocks", "mlp"):
            return [f"policy_reads={self.policy_reads!r} is for policy_kind={only!r}, this is {self.policy_kind!r}"]
        if self.policy_kind == "blocks" and self.policy_width is not None:
            return [f"policy_width={self.policy_width} is for policy_kind='mlp': blocks are as wide as the base"]
        return []

    def _choices(self) -> list[tuple[str, str, tuple[str, ...]]]:
        reads = ("late", "final")
        return [
            ("head", self.head, ("residual", "official")),
            ("inverse_dynamics_reads", self.inverse_dynamics_reads, reads),
            ("policy_kind", self.policy_kind, ("blocks", "mlp")),
            ("policy_reads", self.policy_state, (*reads, "both")),
        ]

    @property
    def policy_state(self) -> PolicyReads:
        """Which of the base's states the policy reads."""
        return self.policy_reads or ("final" if self.policy_kind == "mlp" else "late")

    def state_width(self, width: int) -> int:
        """Numbers in that state, on a base of ``width``."""
        return 2 * width if self.policy_state == "both" else width

    @property
    def late_blocks(self) -> int:
        """How many blocks before the base's end the ``late`` state is taken; 0 when nothing reads it."""
        if self.policy_state == "late":
            return self.policy_layers
        read = self.inverse_dynamics_reads == "late" or self.policy_state == "both"
        return self.inverse_dynamics_layers if read else 0


def merge_width(lm: PreTrainedModel) -> int:
    """The base's MLP width, whatever its config calls it."""
    config = decoder_of(lm).config
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 4 * int(config.hidden_size)
