"""``latent-control reward report``: the course of each part of the reward in a run, and signs of reward hacking.

The held-out truth is the verifier's ``success``. A part (or the reward) that rises over training while success falls or
does not rise is a flag: perhaps the policy was paid for something else than solving the task (Goodhart's law). Slopes
are least squares over the means of each update; their intervals resample updates, so they are too narrow where
neighbouring updates are alike. A flag is a reason to read rollouts, no proof.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.loading import load_config
from pipeline.evaluation.statistics import interval
from pipeline.pages.page import chart, page
from pipeline.replay.reader import ReplayReader
from pipeline.runs.layout import CONFIG, REPLAY
from pipeline.runs.stage_table import IMPROVE
from pipeline.tracking.results import attach

COLUMNS = (
    "rollout_id",
    "prompt_text",
    "text",
    "reward",
    "reward_parts",
    "success",
    "policy_version",
    "level",
    "reward_hash",
)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DRAWS, TO_READ, FEWEST_UPDATES = 1000, 5, 5
ROUNDING = 1e-6
"""A smaller change is the arithmetic's."""
PAGE = "reward-report.html"
REWARD, SUCCESS = "reward", "success"


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Change from the first to the last update along the fitted line. ``Trend(change=0.3, low=0.25, high=0.34)``."""

    change: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Judged rollouts as arrays [R]."""

    versions: np.ndarray
    values: dict[str, np.ndarray]
    """The parts, and ``reward`` and ``success``."""


def report(run_dir: Path) -> dict[str, Any]:
    """The report on each level (latent, token) that left rollouts in the run's replay buffer.

    Raises:
        ValueError: there are none.
    """
    if not (run_dir / REPLAY).is_dir():
        raise ValueError(
            f"{run_dir} has no replay buffer; the report reads rollouts: run improve with replay.enabled: true"
        )
    levels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in ReplayReader(run_dir, shuffle=False, columns=COLUMNS).rows():
        if row["reward"] is not None:
            levels[row["level"]].append(row)
    if not levels:
        raise ValueError(f"{run_dir}/replay holds no judged rollouts")
    weights = load_config(run_dir / CONFIG, [], check_paths=False).reward.weights
    reports = {name: level_report(rows, weights) for name, rows in sorted(levels.items())}
    return {"run": str(run_dir), "weights": weights, "levels": reports}


def level_report(rows: Sequence[Mapping[str, Any]], weights: Mapping[str, float] | None) -> dict[str, Any]:
    """Everything about one level's rollouts."""
    columns = _columns(rows)
    trends = trends_of(columns) if len(np.unique(columns.versions)) >= FEWEST_UPDATES else {}
    flags = [flag | {"rollouts": to_read(rows, columns, flag["part"])} for flag in hacking_flags(trends, weights)]
    return {
        "rollouts": len(rows),
        "updates": len(np.unique(columns.versions)),
        "reward_hashes": sorted({str(row["reward_hash"]) for row in rows}),
        "parts": {name: distribution(values) for name, values in columns.values.items()},
        "correlations": correlations(columns.values),
        "trends": {name: asdict(trend) for name, trend in trends.items()},
        "curves": {name: _means(columns.versions, values) for name, values in columns.values.items()},
        "flags": flags,
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> Columns:
    names = sorted({name for row in rows for name in row["reward_parts"]} - {SUCCESS, REWARD})
    values = {name: np.array([row["reward_parts"].get(name, np.nan) for row in rows], float) for name in names}
    values |= {
        REWARD: np.array([row["reward"] for row in rows], float),
        SUCCESS: np.array([row["success"] for row in rows], float),
    }
    return Columns(versions=np.array([row["policy_version"] for row in rows]), values=values)


def distribution(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation, quantiles, and the shares of rollouts at the smallest and the largest value."""
    known = values[~np.isnan(values)]
    low, high = float(known.min()), float(known.max())
    return {
        "mean": float(known.mean()),
        "std": float(known.std()),
        "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(known, QUANTILES), strict=True)},
        "min": low,
        "max": high,
        "share_at_min": float((known == low).mean()),
        "share_at_max": float((known == high).mean()),
    }


def correlations(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """Pearson's, of each pair; ``None`` where one of the two does not vary."""
    return {a: {b: _correlation(values[a], values[b]) for b in values} for a in values}


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None


def _means(versions: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
    """(update, mean of its rollouts), updates counted from 1 as in ``metrics.jsonl``."""
    return [
        (float(v) + 1, float(np.nanmean(values[versions == v])))
        for v in np.unique(versions)
        if not np.isnan(values[versions == v]).all()
    ]


def trends_of(columns: Columns, seed: int = 0) -> dict[str, Trend]:
    """The trend of each part, with 95 % bootstrap intervals over updates."""
    return {name: trend(_means(columns.versions, values), seed) for name, values in columns.values.items()}


def trend(curve: Sequence[tuple[float, float]], seed: int = 0) -> Trend:
    """Least squares through (update, mean) points, times the span of the updates."""
    x, y = np.array(curve).T
    rows = np.random.default_rng(seed).integers(len(x), size=(DRAWS, len(x)))
    span = float(x.max() - x.min())
    low, high = interval(np.array([_slope(x[r], y[r]) for r in rows]) * span)
    return Trend(change=_slope(x, y) * span, low=low, high=high)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    centred = x - x.mean()
    total = float(centred @ centred)
    return float(centred @ y) / total if total else 0.0


def hacking_flags(trends: Mapping[str, Trend], weights: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """What rises (in the direction that is paid) while success does not: the reward, or a part.

    ``paid`` says whether the config rewards it. Success "falls" when its whole interval is below 0, "stands still" when
    the interval holds 0.
    """
    success = trends.get(SUCCESS)
    if success is None or success.low > 0:
        return []
    flags = []
    for name, found in trends.items():
        weight = 1.0 if name == REWARD else (weights or {}).get(name, 0.0)
        risen = found.high < 0 if weight < 0 else found.low > 0
        if name != SUCCESS and risen and abs(found.change) > ROUNDING:
            how = "falls" if success.high < 0 else "stands still"
            flags.append(
                {
                    "part": name,
                    "paid": bool(weight),
                    "success": how,
                    "trend": asdict(found),
                    "success_trend": asdict(success),
                }
            )
    return sorted(flags, key=lambda flag: not flag["paid"])


def to_read(rows: Sequence[Mapping[str, Any]], columns: Columns, part: str) -> list[dict[str, Any]]:
    """Late rollouts (last quarter of the updates) that failed and yet got most of ``part``, different texts first."""
    late = columns.versions >= np.quantile(columns.versions, 0.75)
    failed = np.flatnonzero(late & (columns.values[SUCCESS] == 0) & ~np.isnan(columns.values[part]))
    ranked = failed[np.argsort(-columns.values[part][failed], kind="stable")]
    different = {str(rows[i]["text"]): i for i in reversed(ranked)}
    chosen = sorted(different.values(), key=lambda i: -columns.values[part][i])[:TO_READ]
    kept = ("rollout_id", "prompt_text", "text", "policy_version")
    return [{key: rows[i][key] for key in kept} | {part: float(columns.values[part][i])} for i in chosen]


def sentence(flag: Mapping[str, Any]) -> str:
    """``format rises by +0.30 (+0.25 to +0.34) while success falls by -0.20 (-0.24 to -0.15): rewarded, perhaps
    gamed``."""
    verb = "rises" if flag["trend"]["change"] > 0 else "falls (its weight is negative)"
    why = (
        "it is rewarded: perhaps the policy games it"
        if flag["paid"]
        else "it is not rewarded: a side effect to look at"
    )
    return (
        f"{flag['part']} {verb} by {_signed(flag['trend'])} while success {flag['success']}, "
        f"{_signed(flag['success_trend'])}; {why}"
    )


def _signed(found: Mapping[str, float]) -> str:
    return f"{found['change']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


HEAD = ("part", "mean", "std", "5 %", "median", "95 %", "at min", "at max", "with success", "change over training")


def table(level: Mapping[str, Any]) -> list[list[str]]:
    """A row per part, under ``HEAD``."""
    rows = []
    for name, d in level["parts"].items():
        together = level["correlations"][name][SUCCESS]
        quantiles = [f"{d['quantiles'][q]:.3f}" for q in ("0.05", "0.5", "0.95")]
        shares = [f"{d['share_at_min']:.0%}", f"{d['share_at_max']:.0%}"]
        change = _signed(level["trends"][name]) if name in level["trends"] else f"fewer than {FEWEST_UPDATES} updates"
        rows.append(
            [
                name,
                f"{d['mean']:.3f}",
                f"{d['std']:.3f}",
                *quantiles,
                *shares,
                "-" if together is None else f"{together:+.2f}",
                change,
            ]
        )
    return rows


def _pairs(level: Mapping[str, Any]) -> list[list[str]]:
    return [[a, *("-" if r is None else f"{r:+.2f}" for r in row.values())] for a, row in level["correlations"].items()]


def write_page(result: Mapping[str, Any], run_dir: Path) -> tuple[Path, str]:
    """The report as a page in the run folder and with its MLflow run; returns its path and "" or why MLflow has no
    copy."""
    tables, charts, flags = [], [], []
    for name, level in result["levels"].items():
        tables.append({"title": f"level {name}: {level['rollouts']} rollouts", "head": HEAD, "rows": table(level)})
        tables.append({"title": f"level {name}: correlations", "head": ["", *level["parts"]], "rows": _pairs(level)})
        charts += [
            chart(f"{name}: {part}", "update", {part: curve, SUCCESS: level["curves"][SUCCESS]})
            for part, curve in level["curves"].items()
        ]
        flags += [{"title": sentence(flag), "rollouts": flag["rollouts"]} for flag in level["flags"]]
    lines = [f"weights: {result['weights'] or 'the reward of the task itself'}", f"{len(flags)} flags"]
    path = run_dir / PAGE
    path.write_text(
        page(f"Rewards of {run_dir.name}", lines=lines, tables=tables, charts=charts, flags=flags), encoding="utf-8"
    )
    settings = load_config(run_dir / CONFIG, [], check_paths=False).tracking
    return path, attach(path, settings, run_dir, IMPROVE)
