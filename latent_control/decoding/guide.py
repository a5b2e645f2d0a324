"""Codes that the caller decides instead of the policy: forced ones, codes that may be chosen at all, and codes barred
at one place.

A forced code is the only one allowed at its place, so greedy, sampling and log-probabilities (0: no choice was made)
need no cases. Axes: R rows, K places, N codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

FREE = -1
"""Where a code would stand: the policy chooses."""

Codes: TypeAlias = torch.Tensor | Sequence[int | None] | Sequence[Sequence[int | None]]
"""For all rows alike, or for each row (or prompt); ``None`` and -1 leave the choice to the policy."""
Allowed: TypeAlias = torch.Tensor | Sequence[int] | Sequence[Sequence[int] | None]
"""Code numbers for all rows alike or for each (``None``: all codes), or a bool tensor [N] or [R, N]."""
Watch: TypeAlias = Callable[[list[int], list[int], list[int]], Sequence[bool]]
"""Told of every step: rows, their new tokens, the codes of these; says which of the rows end here."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """``Guide(codes=torch.tensor([[3, 17, -1]]), allowed=torch.ones(1, 64, dtype=torch.bool))``: two codes, then the
    policy's choice."""

    codes: torch.Tensor
    """[R, K + 1] int64; the last column is free, and stands for all places after it"""
    allowed: torch.Tensor
    """[R, N] bool"""
    barred: torch.Tensor | None = None
    """[J + 1, N] bool, codes that no row may choose at a place; the last line bars none, and stands for all places
    after it"""

    def apply(self, logits: torch.Tensor, rows: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """Logits [b, N] of ``rows`` at their ``places`` (tokens generated so far), -inf where a code may not be
        chosen."""
        where = torch.tensor([rows, places], device=logits.device)
        codes = self.codes[where[0], where[1].clamp(max=self.codes.shape[1] - 1)][:, None]
        only = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, codes.clamp(min=0), True)
        may = self.allowed[where[0]]
        if self.barred is not None:
            may = may & ~self.barred[where[1].clamp(max=len(self.barred) - 1)]
        return logits.masked_fill(~torch.where(codes == FREE, may, only), float("-inf"))


def make_guide(
    codes: Codes | None,
    allowed: Allowed | None,
    *,
    rows: int,
    num_actions: int,
    span: int = 1,
    barred: Mapping[int, Sequence[int]] | None = None,
    device: torch.device | str = "cpu",
) -> Guide | None:
    """The guide for ``rows`` rows; ``None`` when nothing is decided. What is given for fewer rows holds for as many
    after each other.

    ``barred``: by place, codes that no row may choose there: ``{4: [3, 5]}``. A code that is forced there all the same
    is refused.

    Raises: ValueError: a code that does not exist, that ``allowed`` or ``barred`` leaves out, or that changes inside a
        span; no code
            allowed; wrong rows.
    """
    if codes is None and allowed is None and not barred:
        return None
    forced = _spread(_rows_of(codes, "codes"), rows, "codes")
    masks = _spread(_masks_of(allowed, num_actions), rows, "allowed_codes")
    longest = max((len(row) for row in forced if row is not None), default=0)
    table = torch.full((rows, longest + 1), FREE)
    mask = torch.ones(rows, num_actions, dtype=torch.bool)
    for index, (row, permitted) in enumerate(zip(forced, masks, strict=True)):
        if permitted is not None:
            mask[index] = False
            mask[index, torch.tensor(permitted, dtype=torch.long)] = True
        if row is not None:
            _check(row, mask[index].tolist(), num_actions, span)
            table[index, : len(row)] = torch.tensor([FREE if code is None else code for code in row], dtype=torch.long)
    bars = None if not barred else _bars(barred, table, mask, span).to(device)
    return Guide(codes=table.to(device), allowed=mask.to(device), barred=bars)


Row: TypeAlias = Sequence[int | None] | None


def is_one_row(listed: Sequence[object], name: str) -> bool:
    """Whether ``codes`` or ``allowed_codes`` are given for all rows alike. ``None`` is a free code there, and a row
    without limits here."""
    return all(isinstance(item, int) or (item is None and name == "codes") for item in listed)


def _rows_of(codes: Codes | None, name: str) -> list[Row]:
    """One entry for all rows, or one for each."""
    if codes is None:
        return [None]
    listed = codes.tolist() if isinstance(codes, torch.Tensor) else list(codes)
    if any(isinstance(item, bool | float) for item in listed):
        raise ValueError(f"{name}={listed!r:.80}: give whole numbers; a mask is a bool tensor")
    if is_one_row(listed, name):
        return [listed]
    return [None if row is None else list(row) for row in listed]


def _masks_of(allowed: Allowed | None, num_actions: int) -> list[Row]:
    """Allowed codes by number; every one must exist, and there must be one."""
    if isinstance(allowed, torch.Tensor) and allowed.dtype == torch.bool:
        if allowed.shape[-1] != num_actions:
            raise ValueError(f"allowed_codes is a mask of {allowed.shape[-1]} codes, but the model has {num_actions}")
        allowed = [row.nonzero().flatten().tolist() for row in allowed.reshape(-1, num_actions)]
    rows = _rows_of(allowed, "allowed_codes")
    for row in rows:
        if row is None:
            continue
        if not row:
            raise ValueError("allowed_codes is empty: allow at least one code, or leave it out to allow all")
        for code in row:
            _require_code(code, num_actions, "allowed_codes")
    return rows


def _spread(rows: list[Row], wanted: int, name: str) -> list[Row]:
    if not rows or wanted % len(rows):
        raise ValueError(
            f"{name} is given for {len(rows)} rows, but there are {wanted}: give one list for all, or one for each"
        )
    return [row for row in rows for _ in range(wanted // len(rows))]


def _check(row: Sequence[int | None], allowed: list[bool], num_actions: int, span: int) -> None:
    for place, code in enumerate(row):
        if code in (None, FREE):
            continue
        _require_code(code, num_actions, "codes")
        assert code is not None
        if not allowed[code]:
            raise ValueError(f"codes forces code {code} at place {place}, which allowed_codes leaves out")
        first = row[place - place % span]
        if code != first:
            raise ValueError(
                f"codes has {code} at place {place} and {first} where its span begins: one code lasts for {span} tokens"
            )


def _bars(barred: Mapping[int, Sequence[int]], codes: torch.Tensor, allowed: torch.Tensor, span: int) -> torch.Tensor:
    """[J + 1, N] bool of ``barred`` places; every row keeps a code at each of them."""
    table = torch.zeros(max(barred) + 2, allowed.shape[1], dtype=torch.bool)
    for place, listed in barred.items():
        if place < 0 or place % span:
            raise ValueError(f"barred has place {place}: codes are chosen at places 0, {span}, {2 * span} and so on")
        for code in listed:
            _require_code(code, allowed.shape[1], "barred")
            table[place, code] = True
        forced = codes[:, min(place, codes.shape[1] - 1)]
        if clash := sorted(set(forced[forced != FREE].tolist()) & set(listed)):
            raise ValueError(f"codes forces code {clash[0]} at place {place}, where barred forbids it")
        if not bool((allowed & ~table[place]).any(1).all()):
            raise ValueError(f"barred leaves no code at place {place}: forbid fewer there, or allow more")
    return table


def _require_code(code: int | None, num_actions: int, name: str) -> None:
    if not isinstance(code, int) or isinstance(code, bool) or not 0 <= code < num_actions:
        raise ValueError(f"{name} has {code!r}: the model's codes are 0 to {num_actions - 1}")
