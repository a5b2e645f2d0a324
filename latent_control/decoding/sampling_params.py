"""Settings of one call of ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from latent_control.decoding.guide import Guide, Watch
from latent_control.distributions import rollout_seed
from latent_control.text import config_ends


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """``SamplingParams(max_new_tokens=64, temperature=0.7, seed=0)``

    Raises:
        ValueError: ``temperature``, ``top_k`` or ``batch_size`` is out of range.
    """

    max_new_tokens: int | Sequence[int]
    """One number, or one for each output row."""
    temperature: float = 1.0
    """0: take the most likely action."""
    top_k: int | None = None
    """Sample among the k most likely actions."""
    seed: int | None = None
    """Row r draws from a random stream made of (seed, r) alone; ``None``: a seed from torch's global stream."""
    row_seeds: Sequence[int] | None = None
    """A random stream for each output row, in place of ``seed``."""
    stop_token: int | list[int] | None = None
    """End token or tokens; ``None``: the base's (all of them), -1: none."""
    repeats: int = 1
    """Rollouts of each prompt, which share its prefill."""
    batch_size: int | None = None
    """Rows decoded at once; ``None``: all."""
    return_features: bool = False
    """Also return the states that the policy read."""
    aliases: int | None = None
    """Number of most likely codes to search for those that emit the chosen one's token (``Generation.events``)."""
    guide: Guide | None = None
    """Codes that are forced or allowed."""
    watch: Watch | None = None
    """Called at every step; may end rows."""

    def __post_init__(self) -> None:
        if (
            self.temperature < 0
            or (self.top_k is not None and self.top_k < 1)
            or (self.batch_size is not None and self.batch_size < 1)
        ):
            raise ValueError(
                f"temperature={self.temperature}, top_k={self.top_k}, batch_size={self.batch_size}: need "
                "temperature >= 0, top_k >= 1, batch_size >= 1"
            )

    def limits(self, rows: int) -> list[int]:
        """New tokens of each row at most; ``ValueError`` unless there is a positive number for each."""
        limits = torch.as_tensor(self.max_new_tokens).reshape(-1)
        limits = limits.expand(rows) if len(limits) == 1 else limits
        if len(limits) != rows or rows == 0 or int(limits.min()) < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens!r}: need one positive number, or one for each of the {rows} rows"
            )
        return limits.tolist()

    def seeds(self, rows: int) -> Sequence[int]:
        """The seed of each row's random stream; ``ValueError`` unless ``row_seeds`` has one for each."""
        if self.row_seeds is None:
            start = int(torch.randint(2**31, ())) if self.seed is None else self.seed
            return [rollout_seed(start, row) for row in range(rows)]
        if len(self.row_seeds) != rows:
            raise ValueError(f"{len(self.row_seeds)} row_seeds given: need one for each of the {rows} rows")
        return self.row_seeds


def special_tokens(lm: PreTrainedModel, stop_token: int | list[int] | None) -> tuple[tuple[int, ...], int]:
    """(end tokens, pad token) of a base LM; chat models have several. ``stop_token`` -1 switches them off."""
    config = lm.generation_config or lm.config
    ends = config_ends(config) if stop_token is None else stop_token if isinstance(stop_token, list) else [stop_token]
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    return tuple(end for end in ends if end >= 0), pad
