"""Slices: the held-out prompts grouped by a field of their metadata. How a model treats some prompts worse than others
shows here.

Any field can be named, one inside another mapping with a dot (``entry.metadata.difficulty``). Texts, truth values and
numbers with few values make one slice per value; numbers with more than ``FEW`` are cut into ``BINS`` quantile bins
(``3 to 17``); tuples and lists go by their length (``length 3``); of texts with more than ``MOST`` values the rarer
ones share the slice ``other``.
"""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from pipeline.evaluation.statistics import largest_gap, quantile_bins, rate_interval

FEW, BINS, MOST = 8, 4, 20
MISSING, OTHER = "missing", "other"
LARGEST = sys.float_info.max
"""Numbers beyond it, and what is no number (NaN), are slices by their own names."""


def flat(metadata: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each field, those of nested mappings too."""
    for key, value in metadata.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def field_problems(fields: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
    """A message, with the fields there are, for each of ``fields`` that no prompt's metadata has."""
    known = list(dict.fromkeys(name for one in metadata for name, _ in flat(one)))
    messages = []
    for index, name in enumerate(fields):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            there = (
                f"the fields there are: {', '.join(known)}"
                if known
                else "these prompts have no metadata; leave slices out"
            )
            messages.append(f"evaluation.slices[{index}]: no prompt has the metadata field {name}; {hint}{there}")
    return messages


def labels(name: str, metadata: Sequence[Mapping[str, Any]]) -> list[str]:
    """The slice of each prompt by field ``name``, [P]."""
    values = [dict(flat(one)).get(name) for one in metadata]
    present = [v for v in values if v is not None]
    if present and all(isinstance(v, Real | Decimal) and not isinstance(v, bool) for v in present):
        sizes = [float(v) for v in present if abs(v) <= LARGEST]
        if len(set(sizes)) > FEW:
            binned = iter(quantile_bins(sizes, BINS))
            return [next(binned) if v is not None and abs(v) <= LARGEST else _word(v) for v in values]
    words = [_word(v) for v in values]
    common = {word for word, _ in Counter(words).most_common(MOST)}
    return [word if word in common else OTHER for word in words]


def _word(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, list | tuple):
        return f"length {len(value)}"
    if isinstance(value, float):
        return f"{value:.15g}"  # 1.0 is 1
    return str(value) if not isinstance(value, int) or abs(value) <= LARGEST else "inf"


def sliced(
    outcomes: Mapping[str, np.ndarray], by: Mapping[str, Sequence[str]], minimum: int, seed: int
) -> dict[str, Any]:
    """Success slice by slice.

    Args:
        outcomes: success of each prompt, [P], by mode ("sampled", "greedy", ...).
        by: the slice of each prompt, [P], by field.

    Returns: ``{"slices": {field: {slice: {"prompts", "sampled", "sampled_interval", ...}}}, "slice_gaps": {field:
        {mode: ... | None}}, "slice_gap": ..., "slice_gap_interval": ..., "slice_gap_greedy": ..., ...}``, the last ones
        of the field with the largest gap.
    """
    gaps = {
        field: {mode: largest_gap(values, names, minimum, seed) for mode, values in outcomes.items()}
        for field, names in by.items()
    }
    result: dict[str, Any] = {
        "slices": {field: _slices(outcomes, names, seed) for field, names in by.items()},
        "slice_gaps": gaps,
    }
    for mode in outcomes:
        suffix = "" if mode == "sampled" else f"_{mode}"
        found = [gap for modes in gaps.values() if (gap := modes[mode]) is not None]
        if found:
            worst = max(found, key=lambda gap: gap["gap"])
            result |= {f"slice_gap{suffix}": worst["gap"], f"slice_gap{suffix}_interval": [worst["low"], worst["high"]]}
    return result


def _slices(outcomes: Mapping[str, np.ndarray], names: Sequence[str], seed: int) -> dict[str, Any]:
    array = np.asarray(names)
    rows: dict[str, Any] = {}
    for name in dict.fromkeys(sorted(names, key=_order)):
        chosen = array == name
        rows[name] = {"prompts": int(chosen.sum())}
        for mode, values in outcomes.items():
            rows[name] |= {
                mode: float(values[chosen].mean()),
                f"{mode}_interval": rate_interval(values[chosen], seed),
            }
    return rows


def _order(name: str) -> tuple[float, str]:
    """Numbers and bins by size, then words."""
    first = name.split(" ", 1)[0]
    try:
        return float(first), name
    except ValueError:
        return float("inf"), name
