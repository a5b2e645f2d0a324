"""Rollouts of the replay buffer in memory: what offline improvement trains on and off-policy evaluation judges by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.schema import DataSource, ImproveOffline
from configs.schema import RolloutConfig as RolloutSettings
from latent_control.analysis.measures import rollout_logp
from latent_control.model import LatentActionLM
from latent_control.off_policy import Logged
from latent_control.records import RolloutBatch
from pipeline.evaluation.statistics import centred
from pipeline.replay.reader import ReplayReader
from rollout_workers.tasks.protocol import split_of

COLUMNS = (
    "prompt_id",
    "prompt_text",
    "reward_hash",
    "prompt_tokens",
    "tokens",
    "generated",
    "actions",
    "action_logp",
    "reward",
    "success",
    "policy_version",
    "world_hash",
    "level",
)
HELDOUT = "heldout_share"
"""In a checkpoint's manifest: the share of prompts whose rollouts it was not trained on."""
Versions = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class StoredRollouts:
    """R judged rollouts of P prompts; 12 bytes a token in memory, the features not counted."""

    ids: tuple[np.ndarray, ...]
    """R x int32: prompt and generated tokens"""
    actions: tuple[np.ndarray, ...]
    """R x int32: the code of each generated token; 0 at observed ones"""
    generated: tuple[np.ndarray, ...]
    """R x bool: where a token after the prompt was generated; empty: all were"""
    behaviour_logp: np.ndarray
    """[R], summed over a rollout's actions: of the policy that sampled it"""
    rewards: np.ndarray
    """[R]"""
    success: np.ndarray
    """[R] bool, the verifier's full mark, whatever is rewarded"""
    prompts: np.ndarray
    """[R] int, which prompt: with other task options the same id has another text, with other weights another reward"""
    prompt_ids: tuple[str, ...]
    """P"""
    chances: np.ndarray
    """[R], summing to 1: the probability that training draws each"""
    unjudged: int = 0
    """Rollouts left out because the verifier had failed."""
    definitions: int = 1
    """How many definitions the rewards follow (task, options, weights)."""

    def __len__(self) -> int:
        return len(self.rewards)

    def subset(self, kept: np.ndarray) -> StoredRollouts:
        """The rollouts [R] bool marks, their prompts renumbered."""
        rows = np.flatnonzero(kept)
        there, prompts = np.unique(self.prompts[rows], return_inverse=True)
        chances = self.chances[rows]
        return replace(
            self,
            ids=tuple(self.ids[i] for i in rows),
            actions=tuple(self.actions[i] for i in rows),
            generated=tuple(self.generated[i] for i in rows),
            behaviour_logp=self.behaviour_logp[rows],
            rewards=self.rewards[rows],
            success=self.success[rows],
            prompts=prompts,
            prompt_ids=tuple(self.prompt_ids[i] for i in there),
            chances=chances / chances.sum() if len(rows) else chances,
        )

    def split(self, heldout_share: float) -> tuple[StoredRollouts, StoredRollouts]:
        """(training, held out), by a hash of each prompt's id: the same for every buffer and every run."""
        held = np.array(
            [split_of(f"offline {prompt}", heldout_share) == "heldout" for prompt in self.prompt_ids], bool
        )[self.prompts]
        return self.subset(~held), self.subset(held)

    def batch(self, rows: Sequence[int] | np.ndarray, advantages: np.ndarray | None = None) -> RolloutBatch:
        """Rollouts ``rows``, right padded; ``advantages`` [R] are zeros where none are given."""
        shape = (len(rows), max(len(self.ids[i]) for i in rows))
        ids, actions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        real, generated = np.zeros(shape, bool), np.zeros(shape, bool)
        for place, i in enumerate(rows):
            length, start = len(self.ids[i]), len(self.ids[i]) - len(self.actions[i])
            ids[place, :length], real[place, :length] = self.ids[i], True
            actions[place, start:length], generated[place, start:length] = self.actions[i], True
            if len(self.generated[i]):
                generated[place, start:length] = self.generated[i]
        chosen = np.zeros(len(rows)) if advantages is None else advantages[rows]
        return RolloutBatch(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            response_mask=torch.from_numpy(generated),
            actions=torch.from_numpy(actions),
            advantages=torch.from_numpy(chosen.astype(np.float32)),
            index=torch.from_numpy(np.asarray(rows, np.int64)),
        )

    def batches(self, size: int = 128) -> Iterator[tuple[np.ndarray, RolloutBatch]]:
        """All rollouts once, those of similar length together: (their numbers, the batch)."""
        order = np.argsort([len(ids) for ids in self.ids], kind="stable")
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            yield rows, self.batch(rows)


def read_rollouts(
    sources: Sequence[DataSource], *, world: str, versions: Versions | None = None, last_updates: int | None = None
) -> StoredRollouts:
    """Rollouts of replay buffers that were made with the codebook and world model of hash ``world``.

    ``versions``: only of these policies, first and last; ``last_updates``: only of each buffer's last updates.

    Raises:
        ValueError: nothing is left, or a rollout was made with another codebook or world model, or at token level.
    """
    kept: list[dict[str, Any]] = []
    chances: list[float] = []
    unjudged = 0
    for source in sources:
        rows = _within(_rows(Path(str(source.path)), source.min_reward, world), versions, last_updates)
        judged = [row for row in rows if row["reward"] is not None]
        unjudged += len(rows) - len(judged)
        kept += judged
        chances += [source.weight / len(judged)] * len(judged) if judged else []
    if not kept:
        places = ", ".join(str(source.path) for source in sources)
        raise ValueError(
            f"no judged rollout in {places} fits; widen the policy versions, lower min_reward, or give another buffer"
        )
    keys = [(row["prompt_id"], row["prompt_text"], row["reward_hash"]) for row in kept]
    numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
    return StoredRollouts(
        ids=tuple(np.concatenate([row["prompt_tokens"], row["tokens"]]) for row in kept),
        actions=tuple(row["actions"] for row in kept),
        generated=tuple(row["generated"] for row in kept),
        behaviour_logp=np.array([row["action_logp"].sum(dtype=np.float64) for row in kept]),
        rewards=np.array([row["reward"] for row in kept], float),
        success=np.array([row["success"] for row in kept], bool),
        prompts=np.array([numbers[key] for key in keys]),
        prompt_ids=tuple(prompt for prompt, *_ in numbers),
        chances=np.array(chances) / sum(chances),
        unjudged=unjudged,
        definitions=len({definition for *_, definition in numbers}),
    )


def _rows(folder: Path, min_reward: float | None, world: str) -> list[dict[str, Any]]:
    rows = list(ReplayReader(folder, shuffle=False, columns=COLUMNS, min_reward=min_reward).rows())
    latent = [row for row in rows if row["level"] == "latent"]
    if rows and not latent:
        raise ValueError(
            f"the rollouts in {folder} are of level {rows[0]['level']}: only latent-action rollouts can be used here"
        )
    foreign = next((row["world_hash"] for row in latent if row["world_hash"] != world), None)
    if foreign is not None:
        raise ValueError(
            f"the rollouts in {folder} were made with another codebook or world model (hash {foreign[:12]}, the "
            "checkpoint's is "
            f"{world[:12]}): their codes have another meaning; use a checkpoint with the actions stage of that run"
        )
    return latent


def _within(rows: list[dict[str, Any]], versions: Versions | None, last_updates: int | None) -> list[dict[str, Any]]:
    if last_updates is not None and rows:
        newest = max(row["policy_version"] for row in rows)
        rows = [row for row in rows if row["policy_version"] > newest - last_updates]
    return rows if versions is None else [row for row in rows if versions[0] <= row["policy_version"] <= versions[1]]


def logged(model: LatentActionLM, rollouts: StoredRollouts, sampling: RolloutSettings) -> Logged:
    """The rollouts as seen from ``model``'s policy, sampled as ``sampling`` says; one pass over them."""
    logp = np.zeros(len(rollouts))
    for rows, batch in rollouts.batches():
        logp[rows] = rollout_logp(model, batch, temperature=sampling.temperature, top_k=sampling.top_k).cpu().numpy()
    return Logged(log_ratios=logp - rollouts.behaviour_logp, rewards=rollouts.rewards, prompts=rollouts.prompts)


def advantages(rollouts: StoredRollouts, baseline: str) -> np.ndarray:
    """[R]: rewards minus the mean of the same prompt's rollouts (``prompt``) or of all rollouts (``all``); exactly 0
    where those are equal."""
    return centred(rollouts.rewards, rollouts.prompts if baseline == "prompt" else np.zeros(len(rollouts), int))


def rollout_batches(
    rollouts: StoredRollouts, settings: ImproveOffline, *, seed: int, rank: int = 0, world: int = 1, start: int = 0
) -> Iterator[RolloutBatch]:
    """Endless batches from update ``start`` on, drawn with replacement: a function of (seed, update), dealt to the
    ranks."""
    gains = advantages(rollouts, settings.baseline)
    if settings.method == "filtered" and not (gains > 0).any():
        raise ValueError(
            "no rollout is better than its baseline: method filtered has nothing to learn from; set baseline: all, or "
            "give more data"
        )
    size, update = settings.batch_size // world, start
    while True:
        drawn = np.random.default_rng([seed, 2, update]).choice(len(rollouts), settings.batch_size, p=rollouts.chances)
        yield rollouts.batch(drawn[rank * size : (rank + 1) * size], gains)
        update += 1
