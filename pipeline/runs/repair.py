"""Restores a run's config and manifest before it is resumed."""

from __future__ import annotations

import logging
from pathlib import Path

from configs.loading import load_config
from pipeline.runs import manifest
from pipeline.runs.events import Events
from pipeline.runs.layout import CONFIG, EVENTS, MANIFEST

_LOG = logging.getLogger(__name__)


def mend(run_dir: Path, restore_config: bool) -> None:
    """Restore a config that is missing or invalid; write the run's manifest again where it is damaged."""
    problems, text = manifest.problems(run_dir), manifest.kept(run_dir, CONFIG)
    if MANIFEST in problems:
        _say(run_dir, "manifest_renewed", f"{MANIFEST}: {problems[MANIFEST]}; they are taken as they are")
        manifest.renew(run_dir, CONFIG)
    if EVENTS in problems:
        _say(run_dir, "events_lost", f"{EVENTS} {problems[EVENTS]}, and is started again")
    if CONFIG not in problems:
        return
    said = f"{CONFIG} {problems[CONFIG]}"
    if text is not None and (restore_config or not _is_config(run_dir / CONFIG)):
        (run_dir / CONFIG).unlink(missing_ok=True)
        manifest.put(run_dir, CONFIG, text.encode(), keep=True)
        _say(run_dir, "config_restored", f"{said}; it was put back from {MANIFEST}")
        return
    remedy = f"put it back by latent-control resume {run_dir} --restore-config" if text is not None else "restore it"
    on_purpose = f"if it was changed on purpose, delete {MANIFEST} there"
    raise ValueError(f"{run_dir}: {said} since the run began; {remedy}, or, {on_purpose}")


def _say(run_dir: Path, kind: str, text: str) -> None:
    _LOG.warning("%s: %s", run_dir, text)
    Events(run_dir).note(kind, text)


def _is_config(path: Path) -> bool:
    try:
        load_config(path, [], check_paths=False)
    except (ValueError, OSError):
        return False
    return True
