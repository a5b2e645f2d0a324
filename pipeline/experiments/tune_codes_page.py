"""The results of ``tune-codes`` as a table, a figure and a page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.experiments.codebook_score import depth_of
from pipeline.pages.page import report_page
from pipeline.pages.records import Picture, ReportPage, ReportSection, Table
from pipeline.storage.atomic import write_atomic

HEAD = (
    "codes",
    "span",
    "temperature",
    "layers",
    "score",
    "nll codes",
    "lost",
    "perplexity",
    "alive",
    "coverage",
    "distinct",
    "reward (95 % over seeds)",
    "",
)


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Finalists first, then what was stopped; ``HEAD`` names the columns."""
    trials = [*result["finalists"], *sorted(result["stopped"], key=lambda trial: trial["score"])]
    return [_row(trial, result) for trial in trials]


def _row(trial: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    settings, measures, reward = trial["settings"], trial["measures"], trial["reward"]

    def shown(name: str, form: str = ".3f") -> str:
        return f"{measures[name]:{form}}" if name in measures else ""

    lost = f"{max(0.0, measures['nll_marginal'] - measures['nll_base_same']):.3f}" if "nll_marginal" in measures else ""
    marks = ["recommended"] if settings == result["recommended"] else []
    marks += ["yours"] if settings == result["own"] else []
    marks += [] if trial["cloned"] else [trial["error"] or f"stopped after {trial['updates']} updates"]
    return [
        str(settings["num_actions"]),
        str(settings["span"]),
        f"{settings['temperature']:g}",
        depth_of(settings),
        f"{trial['score']:.3f}" if math.isfinite(trial["score"]) else "",
        shown("nll_codes"),
        lost,
        shown("inverse_dynamics_code_perplexity", ".1f"),
        shown("inverse_dynamics_alive_share", ".2f"),
        shown("coverage"),
        shown("distinct_tokens", ".1f"),
        f"{reward['mean']:.3f}" + _between(reward) if reward else "",
        ", ".join(marks),
    ]


def _between(reward: Mapping[str, float]) -> str:
    return f" ({reward['low']:.3f} to {reward['high']:.3f})" if "low" in reward else ""


def picture(result: Mapping[str, Any]) -> bytes:
    """PNG: what the codes leave open against what the policy must choose, nats per token; finalists are filled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for group, filled in (("finalists", True), ("stopped", False)):
        for trial in result[group]:
            measures, settings = trial["measures"], trial["settings"]
            if "nll_codes" not in measures:
                continue
            x = math.log(max(1.0, measures["inverse_dynamics_code_perplexity"])) / settings["span"]
            y = max(measures["nll_codes"], 1e-4)
            best = settings == result["recommended"]
            axes.scatter(
                x,
                y,
                s=90 if best else 40,
                color="#c4622d" if best else "#1b6ca8",
                facecolors=None if filled else "none",
            )
            axes.annotate(
                f"{settings['num_actions']} x {settings['span']}",
                (x, y),
                textcoords="offset points",
                xytext=(6, 4),
                fontsize=8,
            )
    axes.set(
        yscale="log",
        xlabel="choice per token, nats",
        ylabel="left open by the codes, nats per token",
        title="codes x span",
    )
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def write_page(result: Mapping[str, Any], folder: Path) -> Path:
    """``codes.png`` and ``codes.html``, which holds it."""
    image = picture(result)
    write_atomic(folder / "codes.png", image)
    found = Table(title="Codes", head=HEAD, rows=rows(result))
    drawn = "data:image/png;base64," + base64.b64encode(image).decode()
    shown = Picture(source=drawn, words="what codes leave open against what must be chosen; the table has the numbers")
    section = ReportSection(name="codes", title="Codes", lines=[result["verdict"]], tables=[found], pictures=[shown])
    page = folder / "codes.html"
    write_atomic(page, report_page(ReportPage(title="Which codes", sections=[section])).encode())
    return page
