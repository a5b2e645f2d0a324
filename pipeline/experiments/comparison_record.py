"""Keeps a comparison: as JSON and a page beside run B, and in MLflow as a separate run that names the runs compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.loading import load_config
from pipeline.runs.layout import COMPARE, CONFIG
from pipeline.runs.stage_table import EVALUATE, IMPROVE, MAKERS
from pipeline.tracking.results import keep
from pipeline.tracking.server import FIRST_PORT, HOST, compare_link
from pipeline.tracking.stage_record import DESCRIPTION
from pipeline.tracking.uris import read_record

MAIN_RUN = {"base": EVALUATE} | {variant: stages[0] for variant, stages in MAKERS.items()}
"""The MLflow run that tells most of each model."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """``Saved(record=Path("runs/b/compare/with-a-1.json"), link="http://127.0.0.1:5000/#/compare-runs?...",
    not_tracked="")``."""

    record: Path
    link: str
    """MLflow's page with both runs side by side; empty where they are not in one store."""
    not_tracked: str
    """Why MLflow has no copy; empty when it has."""


def save(result: Mapping[str, Any], page: Path) -> Saved:
    """Keep the result of ``compare`` and its page."""
    last, other = Path(result["b"][-1]), Path(result["a"][0])
    settings = load_config(last / CONFIG, [], check_paths=False).tracking
    found = {
        side: [_run_of(Path(folder), variant) for folder in result[side]]
        for side, variant in zip("ab", result["variants"], strict=True)
    }
    link = _link(found)
    known = read_record(last) is not None
    settings = settings if known else settings.model_copy(update={"enabled": False})
    record = keep(
        result,
        last,
        settings,
        folder=COMPARE,
        name=f"with-{other.name}",
        params={row["key"]: " | ".join(row["values"]) for row in result["config"]},
        metrics=metrics(result),
        tags=_tags(result, found, link),
        files=[page],
    )
    return Saved(record=record, link=link, not_tracked="" if settings.enabled else "the run was not tracked")


def metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The comparison's numbers: ``sampled/difference``, ``sampled/low``, ..., ``a_over_b/seconds``."""
    success: Mapping[str, Any] = result["success"] or {}
    found = {
        f"{mode}/{to}": float(d[key])
        for mode, d in success.items()
        for to, key in (("difference", "mean"), ("low", "low"), ("high", "high"))
    }
    return found | {
        f"a_over_b/{name}": float(ratio) for name, ratio in result["costs"]["a_over_b"].items() if ratio is not None
    }


def _run_of(folder: Path, variant: str) -> tuple[str, str, str] | None:
    """(store, experiment, run id) of the stage behind a variant."""
    record = read_record(folder)
    run_id = None if record is None else record["runs"].get(MAIN_RUN.get(variant, IMPROVE))
    return (
        None
        if record is None or run_id is None
        else (str(record["tracking_uri"]), str(record["experiment_id"]), str(run_id))
    )


def _link(found: Mapping[str, list[tuple[str, str, str] | None]]) -> str:
    runs = [run for side in found.values() for run in side]
    there = list(dict.fromkeys(run for run in runs if run is not None))
    if None in runs or len({run[:2] for run in there}) != 1:
        return ""
    store, experiment, _ = there[0]
    server = store if store.startswith(("http://", "https://")) else f"http://{HOST}:{FIRST_PORT}"
    return compare_link(experiment, [run[2] for run in there], server)


def _tags(
    result: Mapping[str, Any], found: Mapping[str, list[tuple[str, str, str] | None]], link: str
) -> dict[str, str]:
    """The verdict as the run's description, with links, and the ids of what was compared."""
    ids = {side: [run[2] for run in runs if run is not None] for side, runs in found.items()}
    experiments = {run[2]: run[1] for runs in found.values() for run in runs if run is not None}
    lines = [str(result["verdict"]), ""]
    for side, variant in zip("ab", result["variants"], strict=True):
        names = ", ".join(Path(folder).name for folder in result[side])
        links = " ".join(f"[{one[:8]}](#/experiments/{experiments[one]}/runs/{one})" for one in ids[side])
        lines.append(f"- {side.upper()}: {names} ({variant}) {links}")
    if link:
        lines += ["", f"[side by side](#{link.partition('#')[2]})"]
    return {
        "stage": COMPARE,
        "compared_a": ",".join(ids["a"]),
        "compared_b": ",".join(ids["b"]),
        DESCRIPTION: "\n".join(lines),
    }
