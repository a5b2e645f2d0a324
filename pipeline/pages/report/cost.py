"""Costs of a run: seconds of each stage, rollouts, tokens, memory, trained parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.console.progress import clock
from pipeline.pages.records import ReportSection, Table
from pipeline.pages.report.results import shown
from pipeline.pages.report.sources import Sources
from pipeline.runs.stage_table import EVALUATE

HEAD = ("stage", "time", "seconds", "updates", "rollouts", "tokens generated", "parameters trained", "peak memory, GiB")


def peak_gib(metrics: Sequence[Mapping[str, Any]], driver: float | None = None) -> float | None:
    """The most that driver and rollout workers held together, at most: the largest worker counts for each.

    Args:
        driver: the peak of the driver's process, where it is known.
    """
    sums = [
        float(r["driver_gib"]) + float(r.get("worker_gib") or 0.0) * float(r.get("rollout_workers") or 0.0)
        for r in metrics
        if r.get("driver_gib") is not None
    ]
    return max([*sums, *([] if driver is None else [driver])], default=None)


NOTE = (
    "Tokens: generated ones only. Memory: driver and rollout workers, the largest worker counting for each; for "
    "stages without workers the driver's peak up to then."
)


def cost(sources: Sources) -> ReportSection:
    """A row for each stage that has begun, and their sum; then what each model cost to make."""
    done: Mapping[str, Any] = sources.stages
    names = list(dict.fromkeys([*done, *(str(r["stage"]) for r in sources.metrics if r.get("stage") != EVALUATE)]))
    if not names:
        return ReportSection(name="cost", title="Cost", lines=["Nothing has been logged yet."])
    rows = [_row(sources, name, done.get(name, {})) for name in names]
    # What is no stage: the evaluation, and the pages at the end, where the run wrote down how long they took.
    after: Mapping[str, float] = sources.summary.get("took", {})
    rows += [[name, clock(took), f"{took:.1f}", *["–"] * 5] for name, took in after.items()]
    seconds = sum(float(record["seconds"]) for record in done.values())
    line = f"The finished stages took {clock(seconds)} together, starting Ray and loading models included"
    line += f"; with {' and '.join(after)} {clock(seconds + sum(after.values()))}." if after else "."
    return ReportSection(
        name="cost",
        title="Cost",
        lines=[line],
        tables=[Table(title="By stage", head=HEAD, rows=rows, note=NOTE), *_models(sources)],
    )


def _row(sources: Sources, name: str, record: Mapping[str, Any]) -> list[str]:
    mine = [r for r in sources.metrics if r.get("stage") == name]
    metrics: Mapping[str, Any] = record.get("metrics", {})
    # Of a stage that is not finished: between its lines, each start's pauses included.
    between = float(mine[-1]["time"]) - float(mine[0]["time"]) if mine and "time" in mine[0] else 0.0
    seconds = float(record.get("seconds", between))
    rollouts = sum(float(r.get("rollouts") or 0) for r in mine)
    tokens = float(metrics.get("tokens") or sum(float(r.get("tokens") or 0) for r in mine))
    trained = metrics.get("parameters_trained")
    memory = peak_gib(mine, record.get("driver_peak_gib"))
    return [
        name + ("" if record else " (not finished)"),
        clock(seconds),
        f"{seconds:.1f}",
        f"{int(mine[-1]['step']):,}" if mine else "–",
        f"{rollouts:,.0f}" if rollouts else "–",
        f"{tokens:,.0f}" if tokens else "–",
        "–" if trained is None else f"{float(trained):,.0f}",
        "–" if memory is None else f"{memory:.2f}",
    ]


def _models(sources: Sources) -> list[Table]:
    counts = ("cost_tokens", "parameters_trained")
    rows = [
        [shown(name), clock(float(row["cost_seconds"])), *(f"{float(row[count]):,.0f}" for count in counts)]
        for name, row in sources.variants.items()
        if "cost_seconds" in row
    ]
    note = "Cumulative over stages, base pretraining excluded."
    head = ("model", "time", "tokens generated", "parameters trained")
    return [Table(title="By model", head=head, rows=rows, note=note)] if rows else []
