"""Searches rollouts by text, regular expression and verdict, in time that no pattern can exceed by much.

Patterns are RE2's (``pyarrow.compute.match_substring_regex``): its matcher is linear in the text, and refuses what
would need much memory (Cox, 2010, https://swtch.com/~rsc/regexp/regexp3.html). A pattern that is large all the same is
tried on few rollouts first, on more while that is fast, and left off after ``MOST_SECONDS``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MOST_LETTERS = 400
"""Of a pattern."""
FIRST_ROWS, MOST_SECONDS, FAST = 16, 2.0, 0.05
NARROW = {"all": None, "good": True, "bad": False}


@dataclass(frozen=True, kw_only=True)
class RolloutSearch:
    """What is looked for: ``RolloutSearch(text=r"= 3\\d ,", regex=True, success="bad", first_update=10)``."""

    text: str = ""
    """Somewhere in the response, whatever its case."""
    regex: bool = False
    prompt: str = ""
    """Somewhere in the prompt or its id."""
    success: str = "all"
    """"all", "good" or "bad\""""
    finish: str = ""
    least_reward: float | None = None
    most_reward: float | None = None
    first_update: int | None = None
    last_update: int | None = None


@dataclass(frozen=True, kw_only=True)
class FoundRollouts:
    """Rows of the table that was searched, the newest first."""

    rows: np.ndarray
    searched: int
    """Rollouts looked at, the newest; fewer than there are where the pattern took too long."""


def search(table: pa.Table, wanted: RolloutSearch) -> FoundRollouts:
    """Rollouts of ``table`` (``pipeline.replay.following``) that meet all of ``wanted``.

    Raises:
        ValueError: the pattern is too long, no regular expression, or too large.
    """
    for name, text in (("text", wanted.text), ("prompt", wanted.prompt)):
        if len(text) > MOST_LETTERS:
            raise ValueError(f"{name} has {len(text)} letters: give at most {MOST_LETTERS}")
    masks = list(_masks(table, wanted))
    rows = np.arange(len(table))[::-1]
    if masks:
        kept = reduce(pc.and_, masks).combine_chunks().fill_null(False).to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(kept)[::-1]
    if not wanted.text:
        return FoundRollouts(rows=rows, searched=len(table))
    return _matching(table["text"], rows, wanted)


def _masks(table: pa.Table, wanted: RolloutSearch) -> Iterator[pa.ChunkedArray]:
    if wanted.prompt:
        named = (pc.match_substring(table[c], wanted.prompt, ignore_case=True) for c in ("prompt_id", "prompt_text"))
        yield pc.or_(*named)
    if NARROW[wanted.success] is not None:
        yield pc.equal(table["success"], NARROW[wanted.success])
    if wanted.finish:
        yield pc.equal(table["finish_reason"], wanted.finish)
    bounds = (
        (pc.greater_equal, "reward", wanted.least_reward),
        (pc.less_equal, "reward", wanted.most_reward),
        (pc.greater_equal, "policy_version", wanted.first_update),
        (pc.less_equal, "policy_version", wanted.last_update),
    )
    yield from (compare(table[column], bound) for compare, column, bound in bounds if bound is not None)


def _matching(texts: pa.ChunkedArray, rows: np.ndarray, wanted: RolloutSearch) -> FoundRollouts:
    match = pc.match_substring_regex if wanted.regex else pc.match_substring
    try:
        match(pa.array([""]), wanted.text)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{wanted.text!r} is not a regular expression that is searched here: {error}") from error
    found, at, size, started = [rows[:0]], 0, FIRST_ROWS, time.perf_counter()
    while at < len(rows) and time.perf_counter() - started < MOST_SECONDS:
        some, began = rows[at : at + size], time.perf_counter()
        hits = match(texts.take(pa.array(some)), wanted.text, ignore_case=True).to_numpy()
        found.append(some[hits])
        at += len(some)
        if time.perf_counter() - began < FAST:
            size *= 2
    return FoundRollouts(rows=np.concatenate(found), searched=at)


def rows_where(table: pa.Table, column: str, value: str) -> np.ndarray:
    """Rows whose ``column`` is ``value``: ``group_id`` for the rollouts of a prompt in one update."""
    hits = pc.equal(table[column], value).combine_chunks().to_numpy(zero_copy_only=False)
    return np.flatnonzero(hits)


def rows_of(table: pa.Table, rows: np.ndarray) -> list[dict[str, Any]]:
    """Rows as dicts; ``reward_parts`` is one, too."""
    found: list[dict[str, Any]] = table.take(pa.array(rows)).to_pylist()
    return [row | {"reward_parts": dict(row["reward_parts"])} for row in found]
