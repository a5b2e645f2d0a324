"""Where codes begin and end when one code lasts for several tokens (a *span*).

Position t produces token t + 1. Spans are laid from the first position of a response, so training, decoding and
learning agree on where they begin; the last one of a response may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Spans:
    """The spans of a batch whose responses are produced at ``mask`` [B, T - 1]."""

    mask: torch.Tensor
    """[B, T - 1] bool, positions that produce a response token"""
    starts: torch.Tensor
    """[B, T - 1] bool, those at which a code is chosen"""
    reads: torch.Tensor
    """[B, T - 1] int64, where the inverse dynamics model is read for each position's code: it has seen the span's
    tokens there"""

    def labels(self, unshifted: torch.Tensor) -> torch.Tensor:
        """l [B, T - 1, N] of inverse dynamics logits u [B, T, N]: for each position, those of its span."""
        return unshifted.gather(1, self.reads[..., None].expand(-1, -1, unshifted.shape[-1]))

    @property
    def first(self) -> torch.Tensor:
        """[M] bool: which of the M positions of ``mask`` begin a span."""
        return self.starts[self.mask]

    @property
    def number(self) -> torch.Tensor:
        """[M] int64: the span each of the M positions of ``mask`` belongs to, counting through the batch."""
        return self.first.cumsum(0) - 1


def lay_spans(mask: torch.Tensor, span: int, look_ahead: int | None = None) -> Spans:
    """Spans of ``span`` tokens over each run of ``mask`` [B, T - 1].

    ``look_ahead``: tokens that a label may see from its span's beginning on, never beyond the run; ``None`` is the span
    itself.
    """
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    before = torch.where(mask, -1, columns).cummax(1).values  # the last position before the run
    after = torch.where(mask, mask.shape[1], columns).flip(1).cummin(1).values.flip(1)  # the first one behind it
    within = torch.where(mask, (columns - before - 1) % span, 0)
    ends = columns - within + (look_ahead or span)
    reads = torch.where(mask, torch.minimum(ends, after), columns + 1)
    return Spans(mask=mask, starts=mask & (within == 0), reads=reads)
