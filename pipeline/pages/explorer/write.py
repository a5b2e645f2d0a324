"""Writes the explorer's page: by the command ``explain``, and at the end of a run."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from configs.loading import load_config
from configs.schema import Explorer, RunConfig
from pipeline.pages.explorer.build import beside, explore
from pipeline.pages.explorer.page import write_page
from pipeline.pages.explorer.records import Dataset
from pipeline.pages.records import as_data
from pipeline.runs import manifest
from pipeline.runs.context import StageContext
from pipeline.runs.environment import calm_libraries
from pipeline.runs.layout import CONFIG, EXPLORER, SUMMARY
from pipeline.runs.stage_table import IMPROVE
from pipeline.runs.summary import read_summary
from pipeline.tracking.results import attach


def explain(
    run_dir: Path, path: Path, settings: Explorer | None = None, *, against: Path | None = None
) -> tuple[tuple[Dataset, ...], str]:
    """Write the page of a run, or of two side by side; returns what is on it, and "" or why MLflow has no copy. The
    verdict on collapse is kept in ``summary.json``, from which all others show it.

    Args:
        settings: default: those of the run's config.

    Raises:
        ValueError: a run has no rollouts of latent actions.
    """
    config = load_config(run_dir / CONFIG, [], check_paths=False)
    calm_libraries()
    torch.set_num_threads(config.cluster.learner_threads)
    first = explore(run_dir, settings)
    datasets: tuple[Dataset, ...] = (first[0],) if against is None else beside(first, explore(against, settings))
    write_page(datasets, path)
    manifest.know_own(run_dir, path)
    if (verdict := first[0].summary.collapse) is not None and (summary := read_summary(run_dir)):
        manifest.put_json(run_dir, SUMMARY, summary | {"collapse": as_data(verdict)})
    return datasets, attach(path, config.tracking, run_dir, IMPROVE)


def wants_page(config: RunConfig) -> bool:
    """Whether a run of ``config`` ends with the page: it is wanted, and there are codes to explore."""
    latent = config.improve is not None and config.improve.level == "latent" and config.rollout.engine != "simulated"
    return config.explorer.enabled and latent and config.replay.enabled


def write_at_end(context: StageContext) -> None:
    """The page of a finished run, if its config ``wants_page``. It never fails the run."""
    if not wants_page(context.config):
        return
    started = time.perf_counter()
    try:
        explain(context.run_dir, context.run_dir / EXPLORER)
    except (ValueError, OSError, RuntimeError) as error:  # memory that does not suffice is a RuntimeError
        context.log.message(f"explorer: not written: {error}; latent-control explain {context.run_dir} tries again")
        return
    context.log.message(f"explorer: {context.run_dir / EXPLORER} ({time.perf_counter() - started:.0f} s)")
