"""``latent-control reward report``: the course of each part of the reward in a run, and signs of reward hacking.

The held-out truth is the verifier's ``success``. A part (or the reward) that rises over training while success falls or
does not rise is a flag: perhaps the policy was paid for something else than solving the task (Goodhart's law). Slopes
are least squares over the means of each update; their intervals resample updates, so they are too narrow where
neighbouring updates are alike. A flag is a reason to read rollouts, no proof.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.loading import load_config
from pipeline.evaluation.statistics import interval
from pipeline.pages.page import report_page
from pipeline.pages.records import Curve, Example, Figure, Gallery, ReportPage, ReportSection, Table
from pipeline.replay.reader import ReplayReader
from pipeline.runs.layout import CONFIG, REPLAY
from pipeline.runs.stage_table import IMPROVE
from pipeline.tracking.results import attach
from rollout_workers.tasks.rewards import OVERLONG

VERDICT = ("reward", "reward_parts", "success", "failure", "finish_reason", "reward_hash")
COLUMNS = ("rollout_id", "prompt_text", "text", "policy_version", "level", *VERDICT)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DRAWS, TO_READ, FEWEST_UPDATES, BINS, REASONS = 1000, 5, 5, 20, 12
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
    weights = load_config(run_dir / CONFIG, [], check_paths=False).reward.weights
    found = report_of(ReplayReader(run_dir, shuffle=False, columns=COLUMNS).rows(), weights)
    if not found["levels"]:
        raise ValueError(f"{run_dir}/replay holds no judged rollouts")
    return {"run": str(run_dir)} | found


def report_of(rows: Iterable[Mapping[str, Any]], weights: Mapping[str, float] | None) -> dict[str, Any]:
    """The same of ``rows`` with ``COLUMNS``; those that could not be judged count for the reasons alone."""
    levels: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        levels[row["level"]].append(row)
    judged = {name: [row for row in some if row["reward"] is not None] for name, some in sorted(levels.items())}
    reports = {name: level_report(some, weights) for name, some in judged.items() if some}
    return {
        "weights": weights,
        "levels": {name: one | {"reasons": reasons(levels[name], one["parts"])} for name, one in reports.items()},
    }


def level_report(rows: Sequence[Mapping[str, Any]], weights: Mapping[str, float] | None) -> dict[str, Any]:
    """Everything about one level's rollouts."""
    columns = _columns(rows)
    trends = trends_of(columns) if len(np.unique(columns.versions)) >= FEWEST_UPDATES else {}
    flags = [flag | {"rollouts": to_read(rows, columns, flag)} for flag in hacking_flags(trends, weights)]
    return {
        "rollouts": len(rows),
        "updates": len(np.unique(columns.versions)),
        "reward_hashes": sorted({str(row.get("reward_hash")) for row in rows}),
        "parts": {name: distribution(values) for name, values in columns.values.items()},
        "correlations": correlations(columns.values),
        "trends": {name: asdict(trend) for name, trend in trends.items()},
        "rewards": columns.values[REWARD].tolist(),
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

    ``paid`` says whether the config rewards it; ``None``: the task's own reward may. Success "falls" when its whole
    interval is below 0, "stands still" when the interval holds 0.
    """
    success = trends.get(SUCCESS)
    if success is None or success.low > 0:
        return []
    flags = []
    for name, found in trends.items():
        # What ``reward.overlong_share`` adds needs no weight.
        weight = 1.0 if name == REWARD else (weights or {}).get(name, float(name == OVERLONG))
        risen = found.high < 0 if weight < 0 else found.low > 0
        if name != SUCCESS and risen and abs(found.change) > ROUNDING:
            how = "falls" if success.high < 0 else "stands still"
            flags.append(
                {
                    "part": name,
                    "paid": None if weights is None and not weight else bool(weight),
                    "success": how,
                    "trend": asdict(found),
                    "success_trend": asdict(success),
                }
            )
    return sorted(flags, key=lambda flag: not flag["paid"])


def to_read(rows: Sequence[Mapping[str, Any]], columns: Columns, flag: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Late rollouts (last quarter of the updates) that failed and yet got most of a flagged part (least of one that
    falls), different texts first."""
    part, values = flag["part"], columns.values[flag["part"]]
    order = -values if flag["trend"]["change"] > 0 else values
    late = columns.versions >= np.quantile(columns.versions, 0.75)
    failed = np.flatnonzero(late & (columns.values[SUCCESS] == 0) & ~np.isnan(values))
    ranked = failed[np.argsort(order[failed], kind="stable")]
    different = {str(rows[i]["text"]): i for i in reversed(ranked)}
    chosen = sorted(different.values(), key=lambda i: order[i])[:TO_READ]
    kept = ("rollout_id", "prompt_text", "text", "policy_version")
    return [{key: rows[i][key] for key in kept} | {part: float(values[i])} for i in chosen]


def sentence(flag: Mapping[str, Any]) -> str:
    """``format rises by +0.30 (+0.25 to +0.34) while success falls by -0.20 (-0.24 to -0.15): rewarded, perhaps
    gamed``."""
    verb = "rises" if flag["trend"]["change"] > 0 else "falls (its weight is negative)"
    why = {
        True: "it is rewarded: perhaps the policy games it",
        False: "it is not rewarded: a side effect to look at",
        None: "the task's own reward may count it: perhaps the policy games it",
    }[flag["paid"]]
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


def reasons(rows: Sequence[Mapping[str, Any]], parts: Mapping[str, Any]) -> list[list[str]]:
    """Why rollouts did not succeed: how they ended, which parts were below their most, or why the verifier failed; how
    many of each, and the text of one."""
    counted: Counter[tuple[str, str]] = Counter()
    texts: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["success"]:
            continue
        got = dict(row["reward_parts"] or {})
        low = [f"{name} {got[name]:g}" for name in parts if name in got and got[name] < parts[name]["max"]]
        why = f"verifier failed: {row['failure']}" if row.get("failure") else ", ".join(low) or "no part is low"
        key = (str(row.get("finish_reason") or ""), why)
        counted[key] += 1
        texts[key] = str(row["text"])[-200:]  # the latest one
    return [[why, end, str(count), texts[end, why]] for (end, why), count in counted.most_common(REASONS)]


def sections(result: Mapping[str, Any]) -> list[ReportSection]:
    """A section for each level: parts and their correlations, flags with rollouts to read, distribution and course."""
    return [_section(name, level) for name, level in result["levels"].items()]


def _section(name: str, level: Mapping[str, Any]) -> ReportSection:
    pairs = [
        [a, *("-" if r is None else f"{r:+.2f}" for r in row.values())] for a, row in level["correlations"].items()
    ]
    tables = [
        Table(title=f"level {name}: {level['rollouts']} rollouts", head=HEAD, rows=table(level)),
        Table(title="Correlations", head=["", *level["parts"]], rows=pairs),
    ]
    if level["reasons"]:
        head = ("why not a success (parts below their most)", "ended by", "rollouts", "the latest one")
        tables.append(Table(title="Failures by the verifier's reason", head=head, rows=level["reasons"]))
    read = [_to_read(flag) for flag in level["flags"]]
    lines = [f"{len(level['flags'])} flags: parts that rise while success does not"]
    figures = [_histogram(level["rewards"]), *(_course(level, part) for part in level["curves"])]
    title = f"Rewards, level {name}"
    return ReportSection(name=name, title=title, lines=lines, figures=figures, tables=tables, galleries=read)


def _to_read(flag: Mapping[str, Any]) -> Gallery:
    texts = [(r["rollout_id"], r["prompt_text"], [(flag["part"], r["text"], False)]) for r in flag["rollouts"]]
    shown = [Example(prompt_id=name, prompt=prompt, answers=answers) for name, prompt, answers in texts]
    return Gallery(title=sentence(flag), total=len(shown), examples=shown)


def _histogram(rewards: Sequence[float]) -> Figure:
    counts, edges = np.histogram(rewards, bins=BINS)
    curve = Curve(name="rollouts", x=range(BINS), y=(counts / max(1, len(rewards))).tolist(), kind="bars")
    labels = [f"{low:.3g}" for low in edges[:-1]]
    title, note = "Distribution of the reward", "Share of all rollouts by reward, each bar from its label to the next"
    return Figure(name="distribution", title=title, across="reward", curves=[curve], labels=labels, note=note)


def _course(level: Mapping[str, Any], part: str) -> Figure:
    drawn = [(name, level["curves"][name]) for name in dict.fromkeys((part, SUCCESS))]
    curves = [Curve(name=name, x=[x for x, _ in points], y=[y for _, y in points]) for name, points in drawn]
    return Figure(name=f"course-{part}", title=f"{part} by update", across="update", curves=curves)


def write_page(result: Mapping[str, Any], run_dir: Path) -> tuple[Path, str]:
    """The report as a page in the run folder and with its MLflow run; returns its path and "" or why MLflow has no
    copy."""
    weights = ReportSection(
        name="weights", title="Weights", lines=[str(result["weights"] or "the reward of the task itself")]
    )
    path = run_dir / PAGE
    made = ReportPage(title=f"Rewards of {run_dir.name}", sections=[weights, *sections(result)])
    path.write_text(report_page(made), encoding="utf-8")
    settings = load_config(run_dir / CONFIG, [], check_paths=False).tracking
    return path, attach(path, settings, run_dir, IMPROVE)
