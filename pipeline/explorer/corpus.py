"""The rollouts that the explorer reads, as flat arrays. Axes: R rollouts, T tokens of all of them, C choices, N codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.replay import ReplayReader

_TOKENS = ("prompt_tokens", "tokens", "actions", "action_logp")
COLUMNS = ("rollout_id", "group_id", "prompt_id", "prompt_text", *_TOKENS, "reward", "success", "policy_version", "world_hash", "level")
MOST_ROLLOUTS, MOST_TOKENS = 20_000, 2_000_000
"""More are not read: row groups, then groups of rollouts, are left out evenly over training."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """R judged rollouts of latent actions in the order of their policy versions, T tokens in all."""

    ids: tuple[str, ...]
    groups: np.ndarray
    """[R] int, 0 to G - 1 in the order of training"""
    prompt_ids: tuple[str, ...]
    prompt_texts: tuple[str, ...]
    prompt_tokens: tuple[np.ndarray, ...]
    rewards: np.ndarray
    """[R]"""
    success: np.ndarray
    """[R] bool"""
    versions: np.ndarray
    """[R] int"""
    offsets: np.ndarray
    """[R + 1]: rollout r has tokens offsets[r] to offsets[r + 1]"""
    tokens: np.ndarray
    """[T]"""
    actions: np.ndarray
    """[T]"""
    logp: np.ndarray
    """[T]"""
    num_actions: int
    span: int
    world: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def rows(self) -> np.ndarray:
        """[T], the rollout each token is in."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @cached_property
    def positions(self) -> np.ndarray:
        """[T], each token's place in its rollout."""
        return np.arange(len(self.tokens)) - self.offsets[self.rows]

    @cached_property
    def choices(self) -> np.ndarray:
        """[C], the tokens at which a code was chosen: the first one of each span."""
        return np.flatnonzero(self.positions % self.span == 0)

    @cached_property
    def advantages(self) -> np.ndarray:
        """[R], reward minus the mean of its group; of all rollouts where no group has two."""
        sizes = np.bincount(self.groups)
        if sizes.max() < 2:
            return self.rewards - self.rewards.mean()
        return self.rewards - (np.bincount(self.groups, self.rewards) / np.maximum(sizes, 1))[self.groups]

    def subset(self, rows: np.ndarray) -> Corpus:
        """Rollouts ``rows``, groups numbered anew. Advantages are then over what is left: take whole groups."""
        cells = np.concatenate([np.arange(self.offsets[r], self.offsets[r + 1]) for r in rows]) if len(rows) else np.empty(0, int)
        return Corpus(
            ids=tuple(self.ids[r] for r in rows),
            groups=np.unique(self.groups[rows], return_inverse=True)[1],
            prompt_ids=tuple(self.prompt_ids[r] for r in rows),
            prompt_texts=tuple(self.prompt_texts[r] for r in rows),
            prompt_tokens=tuple(self.prompt_tokens[r] for r in rows),
            rewards=self.rewards[rows],
            success=self.success[rows],
            versions=self.versions[rows],
            offsets=np.cumsum([0, *np.diff(self.offsets)[rows]]),
            tokens=self.tokens[cells],
            actions=self.actions[cells],
            logp=self.logp[cells],
            num_actions=self.num_actions,
            span=self.span,
            world=self.world,
        )

    def whole_groups(self, rollouts: int, tokens: int) -> np.ndarray:
        """Rows of groups spread evenly over training, at most so many rollouts and about so many tokens, at least one group."""
        count = int(self.groups.max()) + 1
        share = min(1.0, rollouts / len(self), tokens / max(1, len(self.tokens)))
        # The sizes of groups differ where rollouts could not be judged: the last ones may not fit.
        kept = np.unique(np.linspace(0, count - 1, max(1, int(count * share))).round().astype(int))
        rows = np.flatnonzero(np.isin(self.groups, kept))
        return rows[:rollouts]


def read_corpus(run_dir: Path, *, num_actions: int, span: int) -> tuple[Corpus, int]:
    """The rollouts of a run's replay buffer, and how many are stored there.

    Raises:
        ValueError: there are none of latent actions.
    """
    if not (run_dir / "replay").is_dir():
        raise ValueError(f"{run_dir} has no replay buffer; the explorer shows rollouts: run improve with replay.enabled: true")
    stored = ReplayReader(run_dir, shuffle=False, columns=("level",)).rows_stored
    every = max(1, math.ceil(stored / MOST_ROLLOUTS))
    rows = list(ReplayReader(run_dir, shuffle=False, columns=COLUMNS, world=every).rows())
    kept = [row for row in rows if row["level"] == "latent" and row["reward"] is not None and len(row["tokens"])]
    if not kept:
        raise ValueError(
            f"{run_dir}/replay holds no judged rollout of latent actions, which the explorer is about: set improve.level: latent"
        )
    if any(len(row["actions"]) != len(row["tokens"]) for row in kept):
        raise ValueError(f"{run_dir}/replay holds episodes of several turns, which the explorer does not show; read them with pandas")
    corpus = corpus_of(kept, num_actions=num_actions, span=span)
    return corpus.subset(corpus.whole_groups(len(corpus), MOST_TOKENS)), stored


def corpus_of(rows: Sequence[Mapping[str, Any]], *, num_actions: int, span: int) -> Corpus:
    """Rows of the replay buffer's columns, ordered by policy version and group."""
    rows = sorted(rows, key=lambda row: (row["policy_version"], row["group_id"]))
    numbers: dict[str, int] = {}
    worlds = sorted({row["world_hash"] for row in rows})
    if len(worlds) > 1:
        hashes = ", ".join(world[:12] for world in worlds)
        raise ValueError(f"the rollouts are of {len(worlds)} codebooks ({hashes}): their codes mean different things")
    return Corpus(
        ids=tuple(row["rollout_id"] for row in rows),
        groups=np.array([numbers.setdefault(row["group_id"], len(numbers)) for row in rows]),
        prompt_ids=tuple(row["prompt_id"] for row in rows),
        prompt_texts=tuple(row["prompt_text"] for row in rows),
        prompt_tokens=tuple(np.asarray(row["prompt_tokens"]) for row in rows),
        rewards=np.array([row["reward"] for row in rows], float),
        success=np.array([row["success"] for row in rows], bool),
        versions=np.array([row["policy_version"] for row in rows]),
        offsets=np.cumsum([0, *(len(row["tokens"]) for row in rows)]),
        tokens=np.concatenate([row["tokens"] for row in rows]).astype(np.int64),
        actions=np.concatenate([row["actions"] for row in rows]).astype(np.int64),
        logp=np.concatenate([row["action_logp"] for row in rows]).astype(np.float64),
        num_actions=num_actions,
        span=span,
        world=worlds[0],
    )
