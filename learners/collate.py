"""The learner connector: rollouts of any length -> one padded batch with base features and advantages.

Runs once per batch of rollouts, before epochs and minibatches; the base LM is run at most once per rollout, here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

from configs.schema import Improve
from latent_control.algorithms import ALGORITHMS, Outcomes
from latent_control.aliases import event_log_prob, unpack
from latent_control.base_lm import BaseLM
from latent_control.decoding.rescoring import choices
from latent_control.distributions import action_log_probs
from latent_control.losses import kl_divergence
from latent_control.policies.latent import LatentPolicy
from latent_control.token_policy import TokenPolicy
from learners.rl_module import PolicyModule

Batch = dict[str, torch.Tensor]


class RolloutRecord(Protocol):
    """What is read of a rollout record (``rollout_workers.rollouts.Rollout``; learners do not import workers)."""

    group_id: str
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    actions: np.ndarray
    action_logp: np.ndarray
    reward: float | None
    baseline: float | None
    event_logp: np.ndarray | None
    events: np.ndarray | None
    support: np.ndarray
    features: np.ndarray | None
    decode: str
    generated: np.ndarray
    turn_rewards: np.ndarray
    rescored_logp: np.ndarray | None

    @property
    def truncated(self) -> bool: ...

    def __len__(self) -> int: ...


def group_size(rollouts: Sequence[RolloutRecord]) -> int:
    """Rollouts of each prompt, whose groups must lie in consecutive, equally long runs."""
    groups = [r.group_id for r in rollouts]
    size = groups.count(groups[0])
    assert len(groups) % size == 0 and all(len(set(groups[i : i + size])) == 1 for i in range(0, len(groups), size)), (
        f"broken groups: {groups[:20]}"
    )
    return size


def choice_starts(rollouts: Sequence[RolloutRecord], alone: bool) -> list[int]:
    """The column of each rollout's first choice: its prompt's last one, or 0 where rows are responses ``alone``."""
    return [0 if alone else len(r.prompt_tokens) - 1 for r in rollouts]


def collate(
    rollouts: Sequence[RolloutRecord], span: int = 1, *, alone: bool = False, mask_truncated: bool = False
) -> Batch:
    """Right-padded columns: the model is fed prompt + tokens[:-1]; action t sits where it was taken, at P - 1 + t.

    Only tokens that were generated are loss positions; where codes last for ``span`` tokens, only the position that
    chose one is. ``alone``: the policy reads no position but the one at which it chooses, so that rows begin at the
    prompt's last token, as the features do that were shipped. ``mask_truncated``: rollouts that were cut have no loss
    position either.

    Raises:
        ValueError: a rollout was decoded by token.

    Columns: tokens, actions [B, T] int64; action_logp [B, T] float32; loss_mask [B, T] bool (False throughout for a
    rollout without a reward); lengths [B], filled columns of each row; support [B, T, k] when a top k was sampled from;
    features [B, T, D] when they were shipped; events [B, T, ceil(N / 8)] uint8 when the workers recorded them:
    action_logp is then the log-probability of the event, not of the code.
    """
    if any(r.decode == "token" for r in rollouts):
        raise ValueError("rollouts decoded by token have no sampled codes to train on: sample them with decode='code'")
    starts = choice_starts(rollouts, alone)
    lengths = [start + len(r) for start, r in zip(starts, rollouts, strict=True)]
    shape = (len(rollouts), max(lengths))
    tokens, actions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    logp, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for row, (r, start, length) in enumerate(zip(rollouts, starts, lengths, strict=True)):
        taken = slice(start, length)
        tokens[row, :length] = np.concatenate([r.prompt_tokens[-start - 1 :], r.tokens[:-1]])
        actions[row, taken], logp[row, taken] = r.actions, r.action_logp
        counts = r.reward is not None and not (mask_truncated and r.truncated)
        mask[row, taken] = choices(r.generated, len(r), span) & counts
    columns = {
        "tokens": tokens,
        Columns.ACTIONS: actions,
        Columns.ACTION_LOGP: logp,
        Columns.LOSS_MASK: mask,
        "lengths": np.array(lengths),
    }
    batch = {name: torch.from_numpy(column) for name, column in columns.items()}
    if rollouts[0].events is not None:
        batch |= collate_events(rollouts, starts, shape)
    if len(rollouts[0].support):
        support = np.zeros((*shape, rollouts[0].support.shape[1]), np.int64)
        for row, (r, start, length) in enumerate(zip(rollouts, starts, lengths, strict=True)):
            support[row, start:length] = r.support
        batch["support"] = torch.from_numpy(support)
    if rollouts[0].features is not None:
        batch["features"] = pad_features([r.features for r in rollouts], shape[1])
    return batch


def collate_events(rollouts: Sequence[Any], starts: Sequence[int], shape: tuple[int, int]) -> Batch:
    """Which codes would have emitted each token, ``events`` [B, T, ceil(N / 8)] uint8; the log-probabilities of those
    in place of the actions' own."""
    logp = np.zeros(shape, np.float32)
    events = np.zeros((*shape, rollouts[0].events.shape[1]), np.uint8)
    for row, (r, start) in enumerate(zip(rollouts, starts, strict=True)):
        taken = slice(start, start + len(r))
        logp[row, taken], events[row, taken] = r.event_logp, r.events
    return {Columns.ACTION_LOGP: torch.from_numpy(logp), "events": torch.from_numpy(events)}


def events_at(part: Batch, num_actions: int) -> torch.Tensor | None:
    """[M, N] bool at the loss positions; ``None`` where actions stand for themselves."""
    return unpack(part["events"][part[Columns.LOSS_MASK]], num_actions) if "events" in part else None


def support_at(part: Batch) -> torch.Tensor | None:
    """[M, k], the actions that each at the loss positions was sampled from; ``None`` where all could be."""
    return part["support"][part[Columns.LOSS_MASK]] if "support" in part else None


def rescored_gap(rollouts: Sequence[RolloutRecord]) -> tuple[float, int]:
    """(sum of absolute differences, places) between the log-probabilities that workers stored and those they found
    again."""
    gaps = [
        np.abs(r.action_logp - r.rescored_logp)[~np.isnan(r.rescored_logp)]
        for r in rollouts
        if r.rescored_logp is not None
    ]
    return float(sum(gap.sum() for gap in gaps)), sum(map(len, gaps))


def pad_features(features: Sequence[Any], width: int) -> torch.Tensor:
    """[B, width, D] from arrays [T_b, D]; arrays of uint16 hold the bits of bfloat16, which numpy lacks."""
    padded = np.zeros((len(features), width, features[0].shape[-1]), features[0].dtype)
    for row, values in enumerate(features):
        padded[row, : len(values)] = values
    tensor = torch.from_numpy(padded)
    return tensor.view(torch.bfloat16) if padded.dtype == np.uint16 else tensor


def moved_rewards(rollouts: Sequence[RolloutRecord], starts: Sequence[int], mask: torch.Tensor) -> torch.Tensor:
    """[B, T]: each turn's reward at the turn's last choice, and their sum taken off the rollout's last one, which has
    the whole reward."""
    moved = np.zeros(mask.shape)
    for row, (r, start, chosen) in enumerate(zip(rollouts, starts, mask.numpy(), strict=True)):
        places = np.flatnonzero(chosen)
        if not len(places) or not len(r.turn_rewards):
            continue
        turn = np.cumsum(np.diff(r.generated.astype(np.int8), prepend=0) == 1)[places - start] - 1
        ends = places[np.append(np.flatnonzero(np.diff(turn)), len(turn) - 1)]
        moved[row, ends] = r.turn_rewards
        moved[row, ends[-1]] -= r.turn_rewards.sum(dtype=np.float64)
    return torch.from_numpy(moved)


class Collate(ConnectorV2):
    """``collate`` on the learner's device, then what is computed once per batch with the policy as it is before the
    update: features (when not shipped), log-probabilities of the actions taken (decoupled PPO) and of all
    (``target_kl``), its KL to ``reference`` (when that is a penalty), the critic's values; and from all that the
    advantages."""

    def __init__(
        self,
        *,
        improve: Improve,
        device: torch.device,
        base: BaseLM | None,
        reads: str,
        span: int,
        sampling: Mapping[str, Any],
        module: PolicyModule,
        reference: LatentPolicy | TokenPolicy | None,
        average: Callable[[torch.Tensor], torch.Tensor],
        rows_at_once: int = 32,
    ) -> None:
        super().__init__()
        self.improve, self.device, self.base, self.reads, self.span = improve, device, base, reads, span
        self.sampling, self.module, self.average, self.rows_at_once = sampling, module, average, rows_at_once
        self.reference = reference if improve.kl_in == "reward" else None
        self.algorithm = ALGORITHMS[improve.algorithm]

    def __call__(self, *, episodes: list[RolloutRecord], **_: Any) -> dict[str, Batch]:
        """RLlib's entry: a list of rollouts -> ``{module id: batch}``."""
        alone = self.module.policy.stateless and episodes[0].features is not None
        columns = collate(episodes, self.span, alone=alone, mask_truncated=self.improve.mask_truncated)
        batch = {name: column.to(self.device) for name, column in columns.items()}
        total, places = (self.average(torch.tensor(float(x), device=self.device)) for x in rescored_gap(episodes))
        batch["rescored_gap"] = (total / places if places else total).expand(len(episodes))
        if "features" not in batch:
            batch["features"] = self._by_rows(batch, lambda part: self._features(part["tokens"]))
        if self.improve.importance_cap is not None:
            batch["proximal_logp"] = self._by_rows(batch, self._proximal)
        if self.improve.target_kl is not None and self.module.model_config["level"] == "latent":
            batch["start_log_probs"] = self._by_rows(batch, self._start_log_probs)
        if self.reference is not None:
            batch["penalty_kl"] = self._by_rows(batch, self._penalty_kl)
        places = Places(batch[Columns.LOSS_MASK])
        estimate = self.algorithm.estimate(self._outcomes(episodes, choice_starts(episodes, alone), batch, places))
        batch[Columns.ADVANTAGES] = places.spread(estimate.advantages)
        if estimate.returns is not None:
            batch["returns"] = places.spread(estimate.returns)
        return {DEFAULT_MODULE_ID: batch}

    def _outcomes(
        self, rollouts: Sequence[RolloutRecord], starts: Sequence[int], batch: Batch, places: Places
    ) -> Outcomes:
        def of_rollouts(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64, device=self.device)

        kl = batch.get("penalty_kl")
        penalties = None if kl is None else -self.improve.kl_coefficient * places.gather(kl)
        if self.improve.credit == "turn":
            moved = places.gather(moved_rewards(rollouts, starts, batch[Columns.LOSS_MASK].cpu()).to(self.device))
            penalties = moved if penalties is None else penalties + moved
        return Outcomes(
            rewards=of_rollouts([r.reward or 0.0 for r in rollouts]),
            valid=torch.tensor([r.reward is not None for r in rollouts], device=self.device),
            group_size=group_size(rollouts),
            taken=places.taken,
            penalties=penalties,
            baselines=of_rollouts([math.nan if r.baseline is None else r.baseline for r in rollouts])
            if self.algorithm.greedy
            else None,
            values=places.gather(self._by_rows(batch, self._values)) if self.algorithm.critic else None,
            discount=self.improve.discount,
            gae_lambda=self.improve.gae_lambda,
            average=self.average,
        )

    def _by_rows(self, batch: Batch, compute: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
        parts = [
            {name: column[i : i + self.rows_at_once] for name, column in batch.items()}
            for i in range(0, len(batch["tokens"]), self.rows_at_once)
        ]
        with torch.no_grad():
            return torch.cat([compute(part) for part in parts])

    def _features(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the policy reads; the tokens themselves where it is a whole model."""
        if self.reads == "tokens":
            return tokens
        assert self.base is not None, "rollouts came without features and the learner hosts no base LM"
        return self.base.features(tokens).read(self.reads)

    def _proximal(self, part: Batch) -> torch.Tensor:
        """Log-probabilities [B, T] of the actions taken, under the policy being trained."""
        mask = part[Columns.LOSS_MASK]
        actions = part[Columns.ACTIONS][mask]
        logits, support = self.module.policy.logits_at(part["features"], part[Columns.LOSS_MASK]), support_at(part)
        log_probs = action_log_probs(logits, keep=actions, support=support, **self.sampling)
        return _at(mask, event_log_prob(log_probs, actions, events_at(part, log_probs.shape[1])))

    def _start_log_probs(self, part: Batch) -> torch.Tensor:
        """[B, T, N] under the policy being trained, without truncation; 0 where nothing was chosen."""
        mask = part[Columns.LOSS_MASK]
        logits = self.module.policy.logits_at(part["features"], mask)
        found = torch.zeros(*mask.shape, logits.shape[-1], device=mask.device)
        found[mask] = action_log_probs(logits, temperature=self.sampling["temperature"])
        return found

    def _penalty_kl(self, part: Batch) -> torch.Tensor:
        """The exact KL(policy || reference), [B, T], of their distributions without truncation."""
        assert self.reference is not None
        temperature = self.sampling["temperature"]
        log_probs = action_log_probs(
            self.module.policy.logits_at(part["features"], part[Columns.LOSS_MASK]), temperature=temperature
        )
        reference = action_log_probs(
            self.reference.logits_at(part["features"], part[Columns.LOSS_MASK]), temperature=temperature
        )
        return _at(part[Columns.LOSS_MASK], kl_divergence(log_probs, reference))

    def _values(self, part: Batch) -> torch.Tensor:
        """The critic's values, [B, T]."""
        assert self.module.critic is not None
        return _at(part[Columns.LOSS_MASK], self.module.critic(part["features"][part[Columns.LOSS_MASK]]))


class Places:
    """Loss positions ``mask`` [B, T] as one dense run of actions per row, [B, A]: what algorithms reckon with."""

    def __init__(self, mask: torch.Tensor) -> None:
        counts = mask.sum(1)
        self.mask = mask
        self.taken = torch.arange(int(counts.max()), device=mask.device) < counts[:, None]
        """[B, A] bool"""

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, A], 0 where a row has no more actions."""
        return values.new_zeros(self.taken.shape).masked_scatter(self.taken, values[self.mask])

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[B, A] -> [B, T], 0 elsewhere."""
        return _at(self.mask, values[self.taken])


def _at(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values [M] of the loss positions in their places, 0 elsewhere, [B, T]."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values.float())
