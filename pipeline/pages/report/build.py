"""A run folder as a report."""

from __future__ import annotations

from pathlib import Path

from pipeline.console.progress import clock
from pipeline.evaluation.gates import final_of
from pipeline.pages.records import ReportPage, ReportSection
from pipeline.pages.report import codebook, cost, curves, examples, origin, results
from pipeline.pages.report.sources import Sources, read_sources
from pipeline.runs.summary import collapse_words


def build(run_dir: Path, beside: Path | None = None) -> ReportPage:
    """The report of a run, finished or not.

    Args:
        beside: the folder that the page will lie in, for its links; default: the run's.

    Raises:
        ValueError: a file of the run is damaged.
    """
    sources = read_sources(run_dir)
    sections = [
        results.result(sources),
        results.gates(sources),
        learning(sources),
        codebook.codebook(sources),
        examples.examples(sources),
        cost.cost(sources),
        *(origin.environment(sources), origin.reproduce(sources), origin.elsewhere(sources, beside or run_dir)),
    ]
    return ReportPage(title=f"Run report: {run_dir.name}", tiles=tiles(sources), sections=sections)


def learning(sources: Sources) -> ReportSection:
    """The curves."""
    figures = curves.learning_curves(sources)
    lines = [] if figures else ["Nothing has been logged yet."]
    if any(figure.name == "reward" for figure in figures):
        lines.append(
            "Bands are over the updates' means within the window: what the policy gains inside of it widens them, and "
            "neighbouring bands share updates. They are of this one run; other seeds may differ."
        )
    return ReportSection(name="curves", title="Learning curves", lines=lines, figures=figures)


def tiles(sources: Sources) -> list[tuple[str, str, str]]:
    """The run at a glance."""
    found = [("status", sources.status, {"finished": "good", "running": ""}.get(sources.status, "bad"))]
    rows, evaluation = sources.variants, sources.evaluation
    if rows:
        final = final_of(evaluation)
        low, high = rows[final]["sampled_interval"]
        reached = f"{rows[final]['sampled']:.3f} ({low:.3f} – {high:.3f})"
        found.append((f"success of {results.shown(final)}, sampled", reached, ""))
        for name, passes in evaluation.get("differences", {}).items():
            d = passes.get("sampled")
            if d is not None and name in ("cloned - base", f"{final} - base", f"{final} - cloned"):
                mood = "good" if d["low"] > 0 else "bad" if d["high"] < 0 else ""
                text = f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"
                better, _, worse = name.partition(" - ")
                who = "" if better == final else f"{results.shown(better)} "
                found.append((f"{who}against {results.shown(worse)}, sampled", text, mood))
    if (gates := sources.summary.get("gates")) is not None:
        found.append(("gates", "passed" if gates["passed"] else "FAILED", "good" if gates["passed"] else "bad"))
    if collapse_words(sources.summary):
        verdict = str(sources.summary["collapse"]["verdict"])
        found.append(("codebook after RL", verdict, {"no collapse": "good", "collapse": "bad"}.get(verdict, "")))
    stages = sources.stages
    if stages:
        found.append(("stages took", clock(sum(float(stage["seconds"]) for stage in stages.values())), ""))
    return [*found, ("task", sources.config.task.name, ""), ("seed", str(sources.config.seed), "")]
