"""Codes that would have emitted the same token, taken as one event.

Many codes may lead to one token, and only the token decides the reward. The likelihood ratio of the event "one of these
codes" has the expectation of the code's own and less variance (Rao-Blackwell). Events must be the same whichever of
their codes was sampled, so they are the classes of equal tokens among the policy's k most likely codes; each other code
is an event of its own.

Axes: M positions, N codes, k compared ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_BITS = torch.arange(8, dtype=torch.uint8)


def same_token(
    top: torch.Tensor, tokens: torch.Tensor, actions: torch.Tensor, chosen: torch.Tensor, num_actions: int
) -> torch.Tensor:
    """The event of each choice, [M, N] bool.

    Args:
        top: the k most likely codes [M, k] and the ``tokens`` [M, k] they would emit.
        actions: the codes chosen [M] and the tokens ``chosen`` [M] they did emit.
    """
    among = (top == actions[:, None]).any(1, keepdim=True)
    event = torch.zeros(len(actions), num_actions, dtype=torch.bool, device=actions.device)
    event.scatter_(1, top, (tokens == chosen[:, None]) & among)
    return event.scatter_(1, actions[:, None], True)


def chosen_event(
    emit: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    final: torch.Tensor,
    log_probs: torch.Tensor,
    actions: torch.Tensor,
    tokens: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """``same_token`` [M, N] of ``actions`` [M] and their ``tokens`` [M], compared with the ``count`` most likely codes.

    ``emit`` makes tokens from the base's ``final`` states [M, D] and codes.
    """
    likely, top = log_probs.topk(min(count, log_probs.shape[1]), dim=-1)
    emitted = emit(final.repeat_interleave(top.shape[1], 0), top.flatten()).view(top.shape)
    emitted = emitted.masked_fill(likely == -torch.inf, -1)  # a code that cannot be chosen belongs to no event
    return same_token(top, emitted, actions, tokens, log_probs.shape[1])


def pack(event: torch.Tensor) -> torch.Tensor:
    """[M, N] bool -> [M, ceil(N / 8)] uint8."""
    padded = torch.nn.functional.pad(event.to(torch.uint8), (0, -event.shape[1] % 8))
    return (padded.view(len(event), -1, 8) << _BITS.to(event.device)).sum(-1).to(torch.uint8)


def unpack(packed: torch.Tensor, num_actions: int) -> torch.Tensor:
    """What ``pack`` was given."""
    bits = (packed[..., None] >> _BITS.to(packed.device)) & 1
    return bits.flatten(1)[:, :num_actions].bool()


def event_log_prob(log_probs: torch.Tensor, actions: torch.Tensor, event: torch.Tensor | None) -> torch.Tensor:
    """log sum of probabilities over each event [M]; of the action alone where there are no events. ``log_probs`` [M,
    N]."""
    if event is None:
        return log_probs.gather(-1, actions[:, None])[:, 0]
    return log_probs.masked_fill(~event, float("-inf")).logsumexp(-1)
