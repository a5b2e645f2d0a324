"""The shape of the modules beside the base LM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from latent_control.decoder_stack import decoder_of

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
                "differ, but both read 'late', which is one state that many blocks before the base's end: make them "
                "equal, or let one read 'final'"
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


def merge_width(lm: PreTrainedModel) -> int:
    """The base's MLP width, whatever its config calls it."""
    config = decoder_of(lm).config
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 4 * int(config.hidden_size)
