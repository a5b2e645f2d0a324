"""The rollouts that the explorer reads, as flat arrays. Axes: R rollouts, T tokens of all of them, C choices, N
codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.statistics import centred
from pipeline.replay.reader import ReplayReader
from pipeline.runs.layout import REPLAY

_TOKENS = ("prompt_tokens", "tokens", "generated", "actions", "action_logp")
_VERDICT = ("reward", "turn_rewards", "success")
_PLACE = ("rollout_id", "group_id", "prompt_id", "prompt_text", "policy_version", "world_hash", "level")
COLUMNS = (*_PLACE, *_TOKENS, *_VERDICT)
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
    generated: np.ndarray
    """[T] bool, False at what an episode of several turns observed"""
    actions: np.ndarray
    """[T]"""
    logp: np.ndarray
    """[T]"""
    turn_rewards: tuple[tuple[float, ...], ...]
    """R x turns; empty for a single response"""
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
    def _begins(self) -> np.ndarray:
        """[T] bool, the first token of each response."""
        earlier = np.concatenate([[False], self.generated[:-1]])
        return self.generated & (~earlier | (self.positions == 0))

    @cached_property
    def responses(self) -> np.ndarray:
        """[T] int, the response each token belongs to, counting through all rollouts; an observation goes with the one
        before it."""
        return np.cumsum(self._begins) - 1

    @cached_property
    def turns(self) -> np.ndarray:
        """[T] int, which response of its rollout that is: all 0 where rollouts are single responses."""
        return self.responses - self.responses[self.offsets[self.rows]]

    @cached_property
    def places(self) -> np.ndarray:
        """[T], each token's place in its response: ``positions`` where rollouts are single responses."""
        return np.arange(len(self.tokens)) - np.flatnonzero(self._begins)[self.responses]

    @cached_property
    def choices(self) -> np.ndarray:
        """[C], the tokens at which a code was chosen: the first one of each span, which begin again with each
        response."""
        return np.flatnonzero(self.generated & (self.places % self.span == 0))

    @cached_property
    def episodes(self) -> bool:
        """Whether any rollout has several turns."""
        return not self.generated.all()

    @cached_property
    def advantages(self) -> np.ndarray:
        """[R], reward minus the mean of its group; of all rollouts where no group has two."""
        alone = np.bincount(self.groups).max() < 2
        return centred(self.rewards, np.zeros_like(self.groups) if alone else self.groups)

    def subset(self, rows: np.ndarray) -> Corpus:
        """Rollouts ``rows``, groups renumbered. Advantages are then over what is left: take whole groups."""
        cells = (
            np.concatenate([np.arange(self.offsets[r], self.offsets[r + 1]) for r in rows])
            if len(rows)
            else np.empty(0, int)
        )
        texts = ("ids", "prompt_ids", "prompt_texts", "prompt_tokens", "turn_rewards")
        found: dict[str, Any] = {name: tuple(getattr(self, name)[r] for r in rows) for name in texts}
        found |= {name: getattr(self, name)[rows] for name in ("rewards", "success", "versions")}
        found |= {name: getattr(self, name)[cells] for name in ("tokens", "generated", "actions", "logp")}
        groups = np.unique(self.groups[rows], return_inverse=True)[1]
        return replace(self, groups=groups, offsets=np.cumsum([0, *np.diff(self.offsets)[rows]]), **found)

    def whole_groups(self, rollouts: int, tokens: int) -> np.ndarray:
        """Rows of groups spread evenly over training, at most ``rollouts`` of them and about ``tokens`` tokens, at
        least one group."""
        count = int(self.groups.max()) + 1
        share = min(1.0, rollouts / len(self), tokens / max(1, len(self.tokens)))
        # The sizes of groups differ where rollouts could not be judged: the last ones may not fit.
        kept = np.unique(np.linspace(0, count - 1, max(1, int(count * share))).round().astype(int))
        rows = np.flatnonzero(np.isin(self.groups, kept))
        return rows[:rollouts]


def read_corpus(run_dir: Path, *, num_actions: int, span: int) -> tuple[Corpus, int, list[str]]:
    """The rollouts of a run's replay buffer, how many are stored there, and what is to be said of shards that were
    damaged.

    Raises:
        ValueError: there are none of latent actions.
    """
    if not (run_dir / REPLAY).is_dir():
        raise ValueError(
            f"{run_dir} has no replay buffer; the explorer shows rollouts: run improve with replay.enabled: true"
        )
    first = ReplayReader(run_dir, shuffle=False, columns=("level",))  # moves what is damaged out of the way
    stored, every = first.rows_stored, max(1, math.ceil(first.rows_stored / MOST_ROLLOUTS))
    rows = list(ReplayReader(run_dir, shuffle=False, columns=COLUMNS, world=every).rows())
    kept = [row for row in rows if row["level"] == "latent" and row["reward"] is not None and len(row["tokens"])]
    if not kept:
        why = _damage(first) if first.quarantined else "the verifier judged none, or none was stored"
        raise ValueError(
            f"{run_dir}/replay holds no judged rollout of latent actions, which the explorer is about: {why}"
        )
    corpus = corpus_of(kept, num_actions=num_actions, span=span)
    return (
        corpus.subset(corpus.whole_groups(len(corpus), MOST_TOKENS)),
        stored,
        [_damage(first)] if first.quarantined else [],
    )


def _damage(reader: ReplayReader) -> str:
    count, first = len(reader.quarantined), reader.quarantined[0]
    what = f"{count} shards of the replay buffer are" if count > 1 else "a shard of the replay buffer is"
    return f"{what} damaged or missing, and left out: {first.shard}: {first.reason}"


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
        generated=np.concatenate([_generated(row) for row in rows]),
        actions=np.concatenate([row["actions"] for row in rows]).astype(np.int64),
        logp=np.concatenate([row["action_logp"] for row in rows]).astype(np.float64),
        turn_rewards=tuple(tuple(map(float, row["turn_rewards"])) for row in rows),
        num_actions=num_actions,
        span=span,
        world=worlds[0],
    )


def _generated(row: Mapping[str, Any]) -> np.ndarray:
    """[t] bool; the replay buffer leaves it empty where all tokens were generated."""
    marks = row["generated"]
    return np.asarray(marks, bool) if len(marks) else np.ones(len(row["tokens"]), bool)
