"""What a policy did in one rollout, as arrays: a row of a generation, or several with observations between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from latent_control.records import Generation


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """T tokens after a prompt; the columns as ``Rollout`` has them."""

    tokens: np.ndarray
    actions: np.ndarray
    action_logp: np.ndarray
    versions: np.ndarray
    """int32 [T], policy version that chose each action; -1 at observed tokens"""
    finish_reason: str
    generated: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    """bool [T]; empty: all were"""
    support: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    event_logp: np.ndarray | None = None
    events: np.ndarray | None = None
    features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def row_of(generation: Generation, row: int) -> Row:
    """Row ``row`` of a generation."""
    length = int(generation.lengths[row])
    return Row(
        tokens=generation.tokens[row, :length].int().cpu().numpy(),
        actions=generation.actions[row, :length].int().cpu().numpy(),
        action_logp=generation.action_logp[row, :length].float().cpu().numpy(),
        versions=generation.versions[row, :length].int().cpu().numpy(),
        finish_reason=generation.finish_reasons[row],
        support=np.empty(0, np.int32)
        if generation.support is None
        else generation.support[row, :length].int().cpu().numpy(),
        event_logp=None if generation.event_logp is None else generation.event_logp[row, :length].float().cpu().numpy(),
        events=None if generation.events is None else generation.events[row, :length].cpu().numpy(),
        features=_shipped(generation, row),
    )


def joined(turns: Sequence[Row], observations: Sequence[Sequence[int]], finish_reason: str) -> Row:
    """The row of an episode: ``turns`` with the token ids of ``observations`` between them (one fewer).

    The last turn was decoded after all that went before it, so its features are those of the whole row, unless each
    turn has just those of its own places (of two turns or more, the last one's prompt has more than one token).
    """
    lengths = [len(seen) for seen in observations]

    def column(name: str, fill: float) -> np.ndarray:
        parts: list[np.ndarray] = [getattr(turns[0], name)]
        for turn, length in zip(turns[1:], lengths, strict=True):
            values: np.ndarray = getattr(turn, name)
            parts += [np.full((length, *values.shape[1:]), fill, values.dtype), values]
        return np.concatenate(parts)

    alone = all(turn.features is not None and len(turn.features) == len(turn) for turn in turns)
    generated = [np.ones(len(turns[0]), bool)]
    for turn, length in zip(turns[1:], lengths, strict=True):
        generated += [np.zeros(length, bool), np.ones(len(turn), bool)]
    mask = np.concatenate(generated)
    tokens = column("tokens", 0)
    tokens[~mask] = [token for seen in observations for token in seen]
    return Row(
        tokens=tokens,
        actions=column("actions", 0),
        action_logp=column("action_logp", 0.0),
        versions=column("versions", -1),
        finish_reason=finish_reason,
        generated=mask,
        support=column("support", 0) if len(turns[0].support) else turns[0].support,
        event_logp=None if turns[0].event_logp is None else column("event_logp", 0.0),
        events=None if turns[0].events is None else column("events", 0),
        features=column("features", 0) if alone else turns[-1].features,
    )


def _shipped(generation: Generation, row: int) -> Any:
    """Features as numpy; bfloat16, which numpy lacks, travels as its bits (uint16)."""
    if generation.features is None:
        return None
    features = generation.features[row].cpu()
    return features.view(torch.uint16).numpy() if features.dtype == torch.bfloat16 else features.numpy()
