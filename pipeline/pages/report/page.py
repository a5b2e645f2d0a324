"""A report as one HTML file. It has no script and loads nothing; its Content-Security-Policy allows its own style
alone."""

from __future__ import annotations

from importlib.resources import files

from pipeline.pages.charts import draw
from pipeline.pages.page import document, figure, rendered
from pipeline.pages.report.records import ReportPage


def page(report: ReportPage) -> str:
    """The whole page."""
    return document(
        report.title, rendered(_asset("report.html"), report=report, figure=figure), style=_asset("report.css")
    )


def figures(report: ReportPage) -> dict[str, str]:
    """Every figure as a file of its own: ``{"reward.svg": "<svg ..."}``."""
    return {f"{one.name}.svg": str(draw.svg(one, alone=True)) for section in report.sections for one in section.figures}


def _asset(name: str) -> str:
    return (files("pipeline.pages.report") / "assets" / name).read_text(encoding="utf-8")
