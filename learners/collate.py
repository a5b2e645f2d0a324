"""The learner connector: rollouts of any length -> one padded batch with advantages, base features and proximal policy.

Runs once per batch of rollouts, before epochs and minibatches; the base LM is run at most once per rollout, here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

from latent_control.advantages import ADVANTAGES
from latent_control.base import BaseLM
from latent_control.distributions import action_log_probs
from latent_control.tower import Tower

Batch = dict[str, torch.Tensor]


class Rollout(Protocol):
    """What is read of a rollout record (the workers' ``episodes.Rollout``; learners do not import workers)."""

    group_id: str
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    actions: np.ndarray
    action_logp: np.ndarray
    reward: float | None
    features: np.ndarray | None

    def __len__(self) -> int: ...


def group_advantages(rollouts: Sequence[Rollout], algorithm: str) -> torch.Tensor:
    """Advantages [B] of rollouts whose groups lie in consecutive, equally long runs; 0 where the verifier failed."""
    groups = [r.group_id for r in rollouts]
    size = groups.count(groups[0])
    assert len(groups) % size == 0 and all(len(set(groups[i : i + size])) == 1 for i in range(0, len(groups), size)), (
        f"broken groups: {groups[:20]}"
    )
    valid = torch.tensor([r.reward is not None for r in rollouts]).view(-1, size)
    rewards = torch.tensor([r.reward or 0.0 for r in rollouts]).view(-1, size)
    return ADVANTAGES[algorithm](rewards, valid).flatten()


def collate(rollouts: Sequence[Rollout], algorithm: str) -> Batch:
    """Right-padded columns: the model is fed prompt + tokens[:-1]; action t sits where it was taken, at P - 1 + t.

    Columns: tokens, actions [B, T] int64; action_logp [B, T] float32; loss_mask [B, T] bool (False throughout for a
    rollout without a reward); advantages [B]; lengths [B]; features [B, T, D] when they were shipped.
    """
    lengths = [len(r.prompt_tokens) + len(r) - 1 for r in rollouts]
    shape = (len(rollouts), max(lengths))
    tokens, actions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    logp, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for row, (r, length) in enumerate(zip(rollouts, lengths, strict=True)):
        taken = slice(len(r.prompt_tokens) - 1, length)
        tokens[row, :length] = np.concatenate([r.prompt_tokens, r.tokens[:-1]])
        actions[row, taken], logp[row, taken], mask[row, taken] = r.actions, r.action_logp, r.reward is not None
    columns = {"tokens": tokens, Columns.ACTIONS: actions, Columns.ACTION_LOGP: logp, Columns.LOSS_MASK: mask, "lengths": np.array(lengths)}
    batch = {name: torch.from_numpy(column) for name, column in columns.items()}
    if rollouts[0].features is not None:
        batch["features"] = pad_features([r.features for r in rollouts], shape[1])
    return batch | {Columns.ADVANTAGES: group_advantages(rollouts, algorithm)}


def pad_features(features: Sequence[Any], width: int) -> torch.Tensor:
    """[B, width, D] from arrays [T_b, D]; arrays of uint16 hold the bits of bfloat16, which numpy lacks."""
    padded = np.zeros((len(features), width, features[0].shape[-1]), features[0].dtype)
    for row, values in enumerate(features):
        padded[row, : len(values)] = values
    tensor = torch.from_numpy(padded)
    return tensor.view(torch.bfloat16) if padded.dtype == np.uint16 else tensor


class Collate(ConnectorV2):
    """``collate`` on the learner's device, then features (when not shipped), and the actions' log-probabilities under ``proximal``."""

    def __init__(
        self,
        *,
        algorithm: str,
        device: torch.device,
        base: BaseLM | None,
        reads: str,
        sampling: Mapping[str, Any],
        proximal: Tower | None,
        rows_at_once: int = 32,
    ) -> None:
        super().__init__()
        self.algorithm, self.device, self.base, self.reads = algorithm, device, base, reads
        self.sampling, self.proximal, self.rows_at_once = sampling, proximal, rows_at_once

    def __call__(self, *, episodes: list[Rollout], **_: Any) -> dict[str, Batch]:
        """RLlib's entry: a list of rollouts -> ``{module id: batch}``."""
        batch = {name: column.to(self.device) for name, column in collate(episodes, self.algorithm).items()}
        if "features" not in batch:
            batch["features"] = self._by_rows(batch, lambda part: self._features(part["tokens"]))
        if self.proximal is not None:
            batch["proximal_logp"] = self._by_rows(batch, self._proximal)
        return {DEFAULT_MODULE_ID: batch}

    def _by_rows(self, batch: Batch, compute: Any) -> torch.Tensor:
        parts = [
            {name: column[i : i + self.rows_at_once] for name, column in batch.items()}
            for i in range(0, len(batch["tokens"]), self.rows_at_once)
        ]
        with torch.no_grad():
            return torch.cat([compute(part) for part in parts])

    def _features(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.base is not None, "rollouts came without features and the learner hosts no base LM"
        return self.base.features(tokens).read(self.reads)

    def _proximal(self, part: Batch) -> torch.Tensor:
        """Log-probabilities [B, T] of the actions taken, under the policy being trained as it is before this batch."""
        assert self.proximal is not None
        actions = part[Columns.ACTIONS]
        log_probs = action_log_probs(self.proximal(part["features"]), keep=actions, **self.sampling)
        return log_probs.gather(-1, actions[..., None])[..., 0]
