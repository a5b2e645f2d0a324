"""How often each code is used, as a record that shows itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from latent_control.analysis.measures import ALIVE_SHARE, code_perplexity
from latent_control.notebook_views import bars

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True, repr=False)
class CodeUsage:
    """``CodeUsage(counts=(10, 0, 6))``: code 0 was chosen ten times, code 1 never."""

    counts: tuple[int, ...]

    @classmethod
    def of(cls, actions: torch.Tensor | Sequence[int], num_actions: int) -> CodeUsage:
        """Of codes of any shape; -1 (after the end of a row) is passed over.

        Raises:
            ValueError: a code is not below ``num_actions``.
        """
        codes = torch.as_tensor(actions).flatten()
        codes = codes[codes >= 0]
        if len(codes) and int(codes.max()) >= num_actions:
            raise ValueError(
                f"code {int(codes.max())} is not one of {num_actions}: num_actions is too small, or these are tokens"
            )
        return cls(counts=tuple(torch.bincount(codes.long(), minlength=num_actions).tolist()))

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each code, summing to 1; all 0 where nothing was counted."""
        total = sum(self.counts)
        return tuple(count / total if total else 0.0 for count in self.counts)

    @property
    def alive(self) -> int:
        """Codes used more than 0.1 / N of the time."""
        return sum(share > ALIVE_SHARE / len(self.counts) for share in self.shares)

    @property
    def perplexity(self) -> float:
        """exp(entropy of usage): N when all codes are used alike, 1 when one is."""
        return code_perplexity(torch.tensor(self.shares, dtype=torch.float64))

    def top(self, count: int = 10) -> list[tuple[int, int]]:
        """(code, times) of those used most."""
        ranked = sorted(enumerate(self.counts), key=lambda pair: (-pair[1], pair[0]))
        return [(code, times) for code, times in ranked[:count] if times]

    def __repr__(self) -> str:
        total = sum(self.counts)
        often = ", ".join(f"{code} {times / total:.0%}" for code, times in self.top(5))
        return (
            f"CodeUsage({self.alive} of {len(self.counts)} codes active, perplexity {self.perplexity:.1f}, {total:,} "
            "choices" + (f"; most often: {often}" if often else "") + ")"
        )

    def _repr_html_(self) -> str:
        return bars(self.shares, repr(self)[len("CodeUsage(") : -1])
