"""Several runs side by side: runs of one config but for the seed are one method, whose unit is the seed; a method with
one seed has the prompt for a unit, which says nothing about other seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import RunConfig
from pipeline.evaluation.modes import MODES
from pipeline.evaluation.outcome_file import read_outcomes
from pipeline.evaluation.statistics import paired_difference, rate_interval, student
from pipeline.experiments.compare import COSTS, Finished, difference, read_run
from pipeline.pages.charts.records import Curve, Lines
from pipeline.pages.report.curves import band, half_width
from pipeline.runs.layout import OUTCOMES
from pipeline.tracking.uris import flatten

MOST_RUNS, FLIPS, REACH = 8, 30, 10
"""Runs that are compared, flipped prompts that are listed, updates of the mean that has to reach a reward."""
MEANINGLESS = ("seed", "tracking.", "cluster.", "explorer.", "report.", "replay.")
"""Keys that do not make another method: which random numbers, and what is kept of a run."""
ENDS = 1 << 20
"""Bytes of a file's start and end that make its hash."""


def side_by_side(folders: Sequence[Path], variant: str = "improved") -> dict[str, Any]:
    """Methods with success, cost and reward, differences from the first one, flipped prompts, and where configs differ.

    Raises:
        ValueError: fewer than two runs or more than ``MOST_RUNS``; one has no evaluation of ``variant``.
    """
    if not 2 <= len(folders) <= MOST_RUNS:
        raise ValueError(f"{len(folders)} runs are asked for: choose 2 to {MOST_RUNS}")
    runs = [read_run(folder, variant) for folder in folders]
    for run in runs:
        if run.answers is None:
            raise ValueError(f"{run.folder} has no {OUTCOMES}; make it with: latent-control evaluate {run.folder}")
    meanings = {run.folder: meaning(run.config) for run in runs}
    methods: dict[str, list[Finished]] = {}
    for run in runs:
        methods.setdefault(_fingerprint(meanings[run.folder]), []).append(run)
    groups = list(methods.values())
    names = {id(group): "ABCDEFGH"[place] for place, group in enumerate(groups)}
    level = (
        min(float(np.mean([_final(run) for run in group])) for group in groups) if all(r.curve for r in runs) else None
    )
    first, drawn = groups[0], all(len(run.curve) > 1 for run in runs)
    return {
        "methods": [_method(names[id(group)], group, level) for group in groups],
        "differences": [
            {"name": f"{names[id(group)]} - {names[id(first)]}", "mode": mode, **_difference(group, first, mode)}
            for group in groups[1:]
            for mode in MODES
            if all(run.answers and run.answers.get(mode) for run in (*first, *group))
        ],
        "level": level,
        "curves": [asdict(_curves(groups, names, across)) for across in ("update", "rollouts") if drawn],
        "flipped": _flipped(first[0], groups[1][0], variant) if len(groups) > 1 else [],
        "config": _differing([meanings[group[0].folder] for group in groups]),
    }


def meaning(config: RunConfig) -> dict[str, str]:
    """The config by dotted key; what names a file or folder of this machine is its content's hash."""
    return {key: _content(str(value)) for key, value in flatten(config.model_dump(mode="json")).items()}


def _content(value: str) -> str:
    path = Path(value)
    try:
        if not path.is_absolute() or not path.exists():
            return value
        files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
        found = hashlib.sha256()
        for one in files:
            found.update(f"{one.relative_to(path)} {one.stat().st_size} ".encode())
            with one.open("rb") as file:
                found.update(file.read(ENDS))
                file.seek(max(0, one.stat().st_size - ENDS))
                found.update(file.read(ENDS))
    except OSError:
        return value
    return f"{path.name} ({found.hexdigest()[:12]})"


def _fingerprint(found: Mapping[str, str]) -> str:
    return repr(sorted((key, value) for key, value in found.items() if not key.startswith(MEANINGLESS)))


def _differing(found: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    keys = sorted({key for one in found for key in one if not key.startswith(MEANINGLESS)})
    rows = [(key, [one.get(key, "(absent)") for one in found]) for key in keys]
    return [{"key": key, "values": values} for key, values in rows if len(set(values)) > 1]


def _method(name: str, group: Sequence[Finished], level: float | None) -> dict[str, Any]:
    reached = [_reached(run, level) for run in group] if level is not None else []
    costs = {cost: [run.costs[cost] for run in group] for cost in COSTS}
    return {
        "name": name,
        "runs": [{"name": run.folder.name, "seed": run.config.seed} for run in group],
        "success": [
            {"mode": mode, **_rate(group, mode)}
            for mode in MODES
            if all(r.answers and r.answers.get(mode) for r in group)
        ],
        "costs": {cost: None if None in some else float(np.mean(np.array(some))) for cost, some in costs.items()},
        "reached": {of: _mean([one and one[of] for one in reached]) for of in ("rollouts", "seconds")},
    }


def _rate(group: Sequence[Finished], mode: str) -> dict[str, Any]:
    rates = [np.array(list(run.answers[mode].values())) for run in group if run.answers is not None]
    if len(rates) == 1:
        low, high = rate_interval(rates[0], seed=0)
        return {"value": float(rates[0].mean()), "low": low, "high": high, "unit": f"{len(rates[0])} prompts"}
    means = np.array([one.mean() for one in rates])
    half = student(len(means) - 1) * float(means.std(ddof=1)) / len(means) ** 0.5
    value = float(means.mean())
    return {"value": value, "low": value - half, "high": value + half, "unit": f"{len(means)} seeds"}


def _difference(group: Sequence[Finished], first: Sequence[Finished], mode: str) -> dict[str, Any]:
    if min(len(group), len(first)) > 1 or len(group) == len(first):
        found = difference(group, first, mode)
    else:  # one seed on one side: over prompts
        sides = [[run.answers[mode] for run in side if run.answers is not None] for side in (group, first)]
        common = sorted(set.intersection(*(set(answers) for side in sides for answers in side)))
        ours, theirs = (np.mean([[answers[key] for key in common] for answers in side], axis=0) for side in sides)
        found = paired_difference(ours, theirs, seed=0) | {"unit": "prompts", "prompts": len(common)}
    unit = f"{found['prompts']} prompts" if found["unit"] == "prompts" else f"{len(group)} and {len(first)} seeds"
    return {"value": found["mean"], "low": found["low"], "high": found["high"], "unit": unit}


def _rewards(run: Finished) -> np.ndarray:
    return np.array([point["reward"] for point in run.curve])


def _final(run: Finished) -> float:
    return float(_rewards(run)[-REACH:].mean())


def _reached(run: Finished, level: float) -> Mapping[str, float] | None:
    """The first update whose last ``REACH`` rewards are ``level`` on average; ``None``: never."""
    sums = np.concatenate([[0.0], np.cumsum(_rewards(run))])
    for end in range(min(REACH, len(run.curve)), len(run.curve) + 1):
        if (sums[end] - sums[max(0, end - REACH)]) / min(end, REACH) >= level - 1e-9:
            return run.curve[end - 1]
    return None


def _mean(values: Sequence[Any]) -> float | None:
    return float(np.mean(values)) if values and None not in values else None


def _curves(groups: Sequence[Sequence[Finished]], names: Mapping[int, str], across: str) -> Lines:
    """Reward, smoothed; the band is over seeds where there are several, else over neighbouring updates."""
    curves = []
    for group in groups:
        length = min(len(run.curve) for run in group)
        rows = [band(_rewards(run)[:length], half_width(length)) for run in group]
        mean, low, high = rows[0]
        if len(rows) > 1:
            means = np.array([row[0] for row in rows])
            half = student(len(rows) - 1) * means.std(0, ddof=1) / len(rows) ** 0.5
            mean, low, high = means.mean(0), means.mean(0) - half, means.mean(0) + half
        x = np.mean([[point[across] for point in run.curve[:length]] for run in group], axis=0)
        curve = {"x": x.tolist(), "y": mean.tolist(), "low": low.tolist(), "high": high.tolist()}
        curves.append(Curve(name=names[id(group)], **curve))
    note = "Line: mean of neighbouring updates; band: 95 % interval over seeds, with one seed over these updates"
    return Lines(name=f"reward-{across}", title=f"Reward by {across}", across=across, curves=curves, note=note)


def _flipped(a: Finished, b: Finished, variant: str) -> list[dict[str, Any]]:
    """Held-out prompts that one answers greedily with success and the other does not, with both answers."""
    sides = [
        {
            (row.prompt_id, row.prompt): row
            for row in read_outcomes(run.folder / OUTCOMES)
            if row.variant == variant and row.mode == "greedy"
        }
        for run in (a, b)
    ]
    common = [key for key in sides[0] if key in sides[1] and sides[0][key].success != sides[1][key].success]
    return [
        {
            "prompt": key[1],
            "a": sides[0][key].response,
            "b": sides[1][key].response,
            "better": "b" if sides[1][key].success else "a",
        }
        for key in common[:FLIPS]
    ]
