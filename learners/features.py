"""Base features of stored rollouts, computed once and kept: the base is frozen, so they never change."""

from __future__ import annotations

import torch

from latent_control.model import LatentActionLM
from latent_control.records import RolloutBatch


class FeatureCache:
    """The state the policy reads at each position fed, by the rollouts' numbers; in the main memory, up to
    ``megabytes``.

    Rollouts that come when it is full are computed each time they are drawn. Memory per rollout: its tokens x D x the
    size of the base's numbers (18 tokens of the embedded model: 9 KB; 500 tokens of an 8 B model in bfloat16: 4 MB).
    """

    def __init__(self, model: LatentActionLM, megabytes: float) -> None:
        self._model, self._room = model, megabytes * 2**20
        self._kept: dict[int, torch.Tensor] = {}
        self.computed = 0
        """Rollouts that passed through the base so far."""

    @torch.no_grad()
    def __call__(self, batch: RolloutBatch) -> torch.Tensor:
        """[B, T - 1, D] for ``batch.input_ids[:, :-1]``; zeros where a rollout has ended."""
        numbers, lengths = batch.index.tolist(), (batch.attention_mask.sum(1) - 1).tolist()
        fed = batch.input_ids[:, :-1]
        missing = [row for row, number in enumerate(numbers) if number not in self._kept]
        fresh = self._compute(fed[missing], missing, lengths) if missing else {}
        states = [fresh[row] if row in fresh else self._kept[number] for row, number in enumerate(numbers)]
        padded = states[0].new_zeros((*fed.shape, states[0].shape[-1]), device=fed.device)
        for row, state in enumerate(states):
            padded[row, : len(state)] = state
        for row, state in fresh.items():
            self._keep(numbers[row], state)
        return padded

    def _compute(self, fed: torch.Tensor, rows: list[int], lengths: list[int]) -> dict[int, torch.Tensor]:
        # Right padding needs no mask: under causal attention no real position sees it.
        states = self._model.features(fed).read(self._model.config.policy_state)
        self.computed += len(rows)
        return {row: states[place, : lengths[row]] for place, row in enumerate(rows)}

    def _keep(self, number: int, state: torch.Tensor) -> None:
        size = state.numel() * state.element_size()
        if size <= self._room and number not in self._kept:
            self._kept[number] = state.to("cpu", copy=True)
            self._room -= size
