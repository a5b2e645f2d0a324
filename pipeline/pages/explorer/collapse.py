"""The verdict on collapse: has reinforcement learning left few codes in use? How many of them do something, and how
many are the same, is counted beside it: that is the codebook's own doing, the same before and after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.pages.explorer.counts import entropy
from pipeline.pages.explorer.reading import Effects, Read
from pipeline.pages.explorer.records import Collapse

LEFT, OPEN, WEAK, SAME, ALIKE = 0.25, 1.05, 0.01, 0.99, 0.8
"""Bounds: the share of the effective codes that is left; codes open in a state; nats; the share of states at which two
codes with the same top token count as one, and as of one cluster."""


def collapse(found: Read, sums: Effects, healths: list[str]) -> Collapse:
    """Of the policies at the choices that were read and the codes at the states that were probed."""
    marginal, state = (
        tuple(float(np.exp(number(p))) for p in (found.before, found.after))
        for number in (lambda p: entropy(p.mean(0)), lambda p: entropy(p).mean())
    )
    active = [k for k, health in enumerate(healths) if health == "active"]
    probed = [k for k in active if sums.acts(k) is not None]  # the time budget may leave codes without a state
    acting = sum(bool(sums.acts(k)) for k in probed)
    strength = float(sums.kl.sum() / sums.counts.sum()) if sums.counts.sum() else None
    reasons = []
    if marginal[1] < LEFT * marginal[0]:
        reasons.append(f"the policy uses {marginal[1]:.1f} codes altogether, {marginal[0]:.1f} before RL")
    if state[1] < OPEN < state[0]:
        reasons.append(f"in a state {state[1]:.2f} codes are open, {state[0]:.2f} before RL: exploration has ended")
    if strength is not None and strength < WEAK:
        reasons.append(f"codes move the next token by {strength:.2g} nats")
    collapsed = any(not reason.endswith("ended") for reason in reasons)
    verdict = "collapse" if collapsed else "no collapse, but no exploration is left" if reasons else "no collapse"
    return Collapse(
        marginal=marginal,  # type: ignore[arg-type]
        state=state,  # type: ignore[arg-type]
        strength=strength,
        active=len(active),
        probed=len(probed),
        acting=acting,
        distinct=len(clusters(active, sums.agreement, SAME)),
        verdict=verdict,
        reasons=tuple(reasons),
    )


def clusters(codes: Sequence[int], agreement: np.ndarray, least: float) -> list[list[int]]:
    """``codes`` in groups: each joins the first group with whose first code it agrees in ``least`` of the states and
    more (``agreement`` [N, N])."""
    found: list[list[int]] = []
    for code in codes:
        like = next((group for group in found if agreement[group[0], code] >= least), None)
        if like is None:
            found.append([code])
        else:
            like.append(code)
    return found
