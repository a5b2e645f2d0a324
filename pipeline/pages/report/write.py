"""Writes the report: by the command ``report``, and at the end of a run."""

from __future__ import annotations

from pathlib import Path

from configs.loading import load_config
from pipeline.pages.page import report_page
from pipeline.pages.records import ReportPage
from pipeline.pages.report.build import build
from pipeline.runs import manifest
from pipeline.runs.context import StageContext
from pipeline.runs.layout import CONFIG, REPORT
from pipeline.runs.stage_table import EVALUATE
from pipeline.storage.atomic import write_atomic
from pipeline.tracking.results import attach


def report(run_dir: Path, path: Path) -> tuple[ReportPage, str]:
    """Write the report of a run to ``path``; returns it, and "" or why MLflow has no copy.

    Raises:
        ValueError: a file of the run is damaged.
    """
    made = build(run_dir, path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, report_page(made).encode())
    manifest.know_own(run_dir, path)
    settings = load_config(run_dir / CONFIG, [], check_paths=False).tracking
    return made, attach(path, settings, run_dir, EVALUATE)


def write_at_end(context: StageContext) -> None:
    """The report of a finished run, if its config wants one. It never fails the run."""
    if not context.config.report.enabled:
        return
    try:
        report(context.run_dir, context.run_dir / REPORT)
    except (ValueError, OSError, LookupError) as error:  # LookupError: a summary of another version lacks a number
        context.log.message(f"report: not written: {error!r}; latent-control report {context.run_dir} tries again")
        return
    context.log.message(f"report: {context.run_dir / REPORT}")
