"""Codes by a property of the choice: position, turn, task, fields of the prompts' metadata. Axes: C
choices, K keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.evaluation.slices import flat, labels
from pipeline.pages.explorer import counts, gain
from pipeline.pages.explorer.collected import Collected
from pipeline.pages.explorer.corpus import Corpus
from pipeline.pages.explorer.records import Split
from pipeline.pages.explorer.why import prompt_of
from rollout_workers.tasks import Task

POSITION, TURN = "position", "turn"
FIELDS = 4
"""Most fields of the prompts' metadata that choices are split by."""


def splits(some: Collected, task: Task) -> tuple[Split, ...]:
    """One for each property; position is the first."""
    return tuple(_split(some, name, keys, names) for name, keys, names in _keys(some, task))


def _keys(some: Collected, task: Task) -> list[tuple[str, np.ndarray, list[str]]]:
    """(name, the key of each choice of the page's rollouts [C], names of the keys)."""
    shown, at = some.shown, some.shown.choices
    found = [(POSITION, *counts.bins(shown.places[at]))]
    if shown.episodes:
        found.append((TURN, *counts.bins(shown.turns[at])))
    for name, label in _by_prompt(shown, task)[: 1 + FIELDS]:
        known = sorted(set(label.values()), key=_by_number)
        number = {text: i for i, text in enumerate([*known, "unknown"])}
        keys = np.array([number[label.get(pid, "unknown")] for pid in shown.prompt_ids])[shown.rows[at]]
        found.append((name, keys, list(number)[: int(keys.max()) + 1]))
    return found


def _by_prompt(shown: Corpus, task: Task) -> list[tuple[str, dict[str, str]]]:
    """(name, prompt id to label): the task, then fields of the metadata that group prompts."""
    texts = dict(zip(shown.prompt_ids, shown.prompt_texts, strict=True))
    prompts = {pid: prompt_of(task, pid, text) for pid, text in texts.items()}
    found = [("task", {pid: pid.rsplit("/", 2)[0] for pid in prompts})]
    metadata = {pid: prompt.metadata for pid, prompt in prompts.items() if prompt is not None}
    for name in sorted({name for one in metadata.values() for name, _ in flat(one)}):
        some_labels = labels(name, list(metadata.values()))
        if 1 < len(set(some_labels)) <= len(metadata) // 2:
            found.append((name, dict(zip(metadata, some_labels, strict=True))))
    return found


def _by_number(label: str) -> tuple[float, str]:
    first = label.split(" ", 1)[0]
    return (float(first) if first.lstrip("-").replace(".", "", 1).isdecimal() else float("inf"), label)


def _split(some: Collected, name: str, keys: np.ndarray, names: list[str]) -> Split:
    shown, found, n = some.shown, some.found, some.shown.num_actions
    codes = shown.actions[shown.choices]
    table = counts.shares(keys, codes, len(names), n)
    sizes = np.bincount(keys, minlength=len(names))
    split = Split(name=name, keys=tuple(names), counts=tuple(sizes.tolist()), usage=counts.nested(table))
    if found is None:
        return split
    at = np.searchsorted(shown.choices, found.choices)
    own = keys[at]
    hot = np.eye(len(names))[own]  # [c, K]
    each = np.maximum(hot.sum(0), 1)[:, None]
    return replace(
        split,
        before=counts.nested(hot.T @ found.before / each),
        after=counts.nested(hot.T @ found.after / each),
        gain=_gains(some, name, names),
    )


def _gains(some: Collected, name: str, names: list[str]) -> tuple[tuple[float, ...], ...]:
    """The gain by position [K, N]; what lies behind the page's own rollouts counts for their last position."""
    walked = some.walked
    if walked is None or name != POSITION:
        return ()
    width = counts.width_of(some.shown.places[some.shown.choices])
    keys = np.minimum(walked.positions // width, len(names) - 1)
    return counts.nested(
        gain.by_key(keys, walked.codes, walked.parts, (len(names), some.shown.num_actions), int(walked.sizes.sum()))
    )
