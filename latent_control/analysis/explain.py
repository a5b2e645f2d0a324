"""What a model would have done: two policies at the same choices, every code's tokens, and endings after another
choice.

Axes: B rows, T tokens, C choices, D width, N codes, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from latent_control.decoding.sampling_params import special_tokens
from latent_control.distributions import action_log_probs
from latent_control.model import LatentActionLM
from latent_control.policies.latent import LatentPolicy
from latent_control.records import TokenBatch
from latent_control.text import padded


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The C choices of a batch, rows outer, positions inner."""

    final: torch.Tensor
    """[C, D], the base's state that the world model reads there"""
    policies: tuple[torch.Tensor, ...]
    """each [C, N]: probabilities, as they are sampled from"""


@torch.no_grad()
def read_choices(
    model: LatentActionLM, policies: Sequence[LatentPolicy], batch: TokenBatch, *, temperature: float, top_k: int | None
) -> Choices:
    """One base pass over right-padded rows; each of ``policies`` (of the model's own shape) at every choice."""
    features = model.features(batch.input_ids[:, :-1])
    starts = model.spans(batch.response_mask[:, 1:]).starts
    states = features.read(model.config.policy_state)
    found = [
        action_log_probs(policy(states)[starts], temperature=temperature, top_k=top_k).exp() for policy in policies
    ]
    return Choices(final=features.read("final")[starts], policies=tuple(found))


@torch.no_grad()
def token_log_probs(model: LatentActionLM, final: torch.Tensor, codes: torch.Tensor | None = None) -> torch.Tensor:
    """log p(token | state, code) [C, K, V] at states ``final`` [C, D] for ``codes`` [C, K], by default for all N."""
    return torch.log_softmax(_world_logits(model, final, codes).float(), -1)


@torch.no_grad()
def tokens_of_codes(
    model: LatentActionLM, final: torch.Tensor, codes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token that each of ``codes`` [C, K] (default: all N) produces at states ``final`` [C, D], and its
    probability; both [C, K].

    The token is the argmax of the logits, as in decoding: of rounded probabilities it can be another one.
    """
    logits = _world_logits(model, final, codes)
    tokens = logits.argmax(-1)
    return tokens, torch.log_softmax(logits.float(), -1).gather(-1, tokens[..., None])[..., 0].exp()


@torch.no_grad()
def tokens_of_all(model: LatentActionLM, final: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``tokens_of_codes`` of all N at one state ``final`` [D], both [N], as a row that is decoded alone would have
    them.

    In half precision a batch rounds otherwise than one row, and ties are common: there each code goes alone.
    """
    if final.dtype == torch.float32:
        tokens, certainty = tokens_of_codes(model, final[None])
        return tokens[0], certainty[0]
    codes = torch.arange(model.config.num_actions, device=final.device)
    found = [tokens_of_codes(model, final[None], code.view(1, 1)) for code in codes]
    return torch.cat([tokens[0] for tokens, _ in found]), torch.cat([certainty[0] for _, certainty in found])


def _world_logits(model: LatentActionLM, final: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor:
    """[C, K, V] in the base's precision."""
    if codes is None:
        return model.world_logits_of_all(final)
    states = final[:, None].expand(*codes.shape, -1)
    return model.head(
        states, model.merge.lookup(states.to(model.codebook.dtype), codes, model.merge.table(model.codebook))
    )


class Walker:
    """Policies on the straight line between two of one shape, through their weights; one copy of them in memory."""

    def __init__(self, model: LatentActionLM, first: LatentPolicy, last: LatentPolicy) -> None:
        self.model, self.first, self.last = model, first, last
        self._policy = copy.deepcopy(first)

    @torch.no_grad()
    def at(self, share: float) -> LatentPolicy:
        """The policy at ``share`` of the way, valid until the next call."""
        for own, a, b in zip(self._policy.parameters(), self.first.parameters(), self.last.parameters(), strict=True):
            own.copy_(torch.lerp(a, b, share))
        return self._policy

    @torch.no_grad()
    def rises(
        self,
        rows: Sequence[Sequence[int]],
        actions: Sequence[Sequence[int]],
        ends: tuple[float, float],
        *,
        temperature: float,
        top_k: int | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of each code that was chosen at ``ends[1]`` minus that at ``ends[0]``.

        Args:
            rows: prompts with their generated tokens.
            actions: the code of each generated token.

        Returns:
            (row, place among its generated tokens) of each choice, [C, 2], and the differences [C].
        """
        ids, _ = padded(rows, self.model.codebook.device)
        response, codes = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
        starts = [len(row) - len(own) for row, own in zip(rows, actions, strict=True)]
        for r, (start, own) in enumerate(zip(starts, actions, strict=True)):
            response[r, start : start + len(own)] = True
            codes[r, start : start + len(own)] = torch.tensor(own, device=codes.device)
        states = self.model.features(ids[:, :-1]).read(self.model.config.policy_state)
        chosen = self.model.spans(response[:, 1:]).starts
        taken = codes[:, 1:][chosen]
        low, high = (
            action_log_probs(self.at(end)(states)[chosen], temperature=temperature, top_k=top_k, keep=taken).gather(
                -1, taken[:, None]
            )[:, 0]
            for end in ends
        )
        places = chosen.nonzero().cpu().numpy()
        places[:, 1] += 1 - np.array(starts)[places[:, 0]]
        return places, (high - low).double().cpu().numpy()


@torch.no_grad()
def play_on(
    model: LatentActionLM,
    prefixes: Sequence[Sequence[int]],
    codes: Sequence[int],
    limits: Sequence[int],
    *,
    stop_token: int | None = None,
    batch_size: int = 64,
) -> list[list[int]]:
    """The tokens after each prefix when its code is forced for one span and the policy chooses greedily from then on.

    ``limits``: most new tokens of each row, at least 1.
    """
    ends, _ = special_tokens(model.base.lm, stop_token)
    endings: list[list[int]] = [[] for _ in prefixes]

    def live() -> list[int]:
        return [
            r for r, ending in enumerate(endings) if len(ending) < limits[r] and (not ending or ending[-1] not in ends)
        ]

    for _ in range(model.config.span):
        for rows in _pieces(live(), batch_size):
            final = _last_states(model, [[*prefixes[r], *endings[r]] for r in rows])
            forced = torch.tensor([[codes[r]] for r in rows], device=final.device)
            for r, token in zip(rows, tokens_of_codes(model, final, forced)[0][:, 0].tolist(), strict=True):
                endings[r].append(token)
    if rows := live():
        ids, mask = padded([[*prefixes[r], *endings[r]] for r in rows], model.codebook.device)
        left = [limits[r] - len(endings[r]) for r in rows]
        out = model.generate(
            ids, mask, max_new_tokens=left, temperature=0.0, stop_token=stop_token, batch_size=batch_size
        )
        for place, r in enumerate(rows):
            endings[r] += out.tokens[place, : int(out.lengths[place])].tolist()
    return endings


@torch.no_grad()
def replay(model: LatentActionLM, prompt: Sequence[int], codes: Sequence[int], limit: int) -> list[int]:
    """The tokens after ``prompt`` when ``codes`` are forced and the policy chooses greedily after them; at most
    ``limit``.

    One row alone, token by token, as an answer is decoded that somebody steers: in half precision, where a batch or a
    prefix that is read at once rounds otherwise, only this writes the same.
    """
    ids = torch.tensor([list(prompt)], device=model.codebook.device)
    out = model.generate(ids, max_new_tokens=limit, temperature=0.0, codes=list(codes))
    tokens: list[int] = out.tokens[0, : int(out.lengths[0])].tolist()
    return tokens


def _pieces(rows: list[int], size: int) -> list[list[int]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _last_states(model: LatentActionLM, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The base's final state [B, D] at the end of each row; padding on the right never reaches it."""
    ids, mask = padded(rows, model.codebook.device)
    final = model.features(ids).read("final")
    return final[torch.arange(len(rows), device=final.device), mask.sum(1) - 1]
