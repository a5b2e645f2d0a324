"""Restores a run's config and manifest before it is resumed."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from configs.loading import load_config
from configs.paths import path_fields
from configs.redaction import HIDDEN, without_secrets
from configs.renamed import rename
from configs.yaml_text import read, write
from pipeline.runs import manifest
from pipeline.runs.events import Events
from pipeline.runs.layout import CHECKPOINTS, CONFIG, EVENTS, MANIFEST, METRICS, stage_record
from pipeline.runs.stage_table import planned
from pipeline.storage import checkpoints

_LOG = logging.getLogger(__name__)
URI, LOGIN = "MLFLOW_TRACKING_URI", ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
"""Variables that MLflow's client reads."""

HOW = (
    *("num_workers", "cpus_per_worker", "gpus_per_worker", "checkpoint_every", "keep_checkpoints", "keep_best"),
    *("log_every", "evaluate_every"),
)
"""Settings of a stage by which it is worked, not what it trains: they may change once it is done."""


def mend(run_dir: Path, restore_config: bool) -> None:
    """Restore a config that is missing or invalid; write the run's manifest again where it is damaged.

    Raises:
        ValueError: the config was changed (the message has both values), or a secret of the one to restore is nowhere.
    """
    problems, text = manifest.problems(run_dir), manifest.kept(run_dir, CONFIG)
    if CONFIG in problems and text is not None and (restore_config or not _is_config(run_dir / CONFIG)):
        whole = _with_secrets(run_dir, text)
        (run_dir / CONFIG).unlink(missing_ok=True)
        manifest.put(run_dir, CONFIG, whole.encode(), keep=True)
        _say(run_dir, "config_restored", f"{CONFIG} {problems.pop(CONFIG)}; it was put back from {MANIFEST}")
    _refuse_changes(run_dir, text)
    if MANIFEST in problems:
        _say(run_dir, "manifest_renewed", f"{MANIFEST}: {problems[MANIFEST]}; they are taken as they are")
        manifest.renew(run_dir, CONFIG)
    if METRICS in problems:
        _say(run_dir, "metrics_changed", f"{METRICS} {problems[METRICS]}")
    if EVENTS in problems:
        _say(run_dir, "events_lost", f"{EVENTS} {problems[EVENTS]}, and is continued")
    if CONFIG not in problems:
        return
    remedy = f"put it back by latent-control resume {run_dir} --restore-config" if text is not None else "restore it"
    on_purpose = f"if it was changed on purpose, delete {MANIFEST} there"
    changed = _listed(_values(text), _values(without_secrets((run_dir / CONFIG).read_text())))
    raise ValueError(f"{run_dir}: {CONFIG} {problems[CONFIG]} since the run began{changed}; {remedy}, or, {on_purpose}")


def _with_secrets(run_dir: Path, text: str) -> str:
    """The config that the manifest keeps without its secrets, with those of the file that it replaces, or of MLflow's
    variables."""
    if HIDDEN not in text or manifest.wrote(run_dir, CONFIG, text.encode()):  # asterisks of the user's own
        return text
    try:
        now = read((run_dir / CONFIG).read_text())[0]
    except (OSError, ValueError):
        now = None
    missing: list[str] = []
    tree = _filled(read(text)[0], now, "", missing)
    if missing:
        raise ValueError(
            f"{run_dir}: {CONFIG} cannot be put back: {MANIFEST} keeps no secrets, and {missing[0]} lacks one; set "
            f"{URI} to the whole address (or, of a server, {' and '.join(LOGIN)}), or write {CONFIG} again by hand and "
            f"delete {MANIFEST}"
        )
    return write(tree)


def _filled(kept: Any, now: Any, name: str, missing: list[str]) -> Any:
    """``kept`` with what ``now`` has in the same places for what is hidden; ``missing`` names what was not found."""
    if isinstance(kept, Mapping):
        there = now if isinstance(now, Mapping) else {}
        return {key: _filled(value, there.get(key), f"{name}.{key}", missing) for key, value in kept.items()}
    if isinstance(kept, list):
        others = chain(now if isinstance(now, list) else (), repeat(None))
        both = enumerate(zip(kept, others, strict=False))
        return [_filled(one, other, f"{name}[{place}]", missing) for place, (one, other) in both]
    if not isinstance(kept, str) or HIDDEN not in kept:
        return kept
    for whole in (now, os.environ.get(URI)):
        # What is no address may have asterisks of the user's own.
        if isinstance(whole, str) and without_secrets(whole) == kept and not (HIDDEN in whole and "://" in whole):
            return whole
    if name == ".tracking.uri" and kept.startswith("http") and os.environ.keys() >= set(LOGIN):
        return re.sub(r"(?<=//)[^/]*@", "", kept)
    missing.append(f"{name[1:]} ({kept})")
    return kept


def _refuse_changes(run_dir: Path, text: str | None) -> None:
    """A finished stage is not trained again, and its result never passed off as one of other settings."""
    now = load_config(run_dir / CONFIG, [], check_paths=False)
    for stage in planned(now):
        result = run_dir / CHECKPOINTS / stage.name
        if not (run_dir / stage_record(stage.name)).is_file() or checkpoints.verify(result, hashes=False):
            continue
        top = stage.section.partition(".")[0]
        sections = ("seed", "task", top, *(("reward",) if stage.online else ()))
        recorded = checkpoints.read_info(result).get("config", {})
        rename(recorded)
        before = _relevant(recorded, sections)
        after = _relevant(now.model_dump(mode="json"), sections)
        if changed := _listed(before, {name: after[name] for name in before if name in after}):
            back = "--restore-config does that" if text is not None else "edit it"
            raise ValueError(
                f"{run_dir}: stage {stage.name} is finished, and was trained with other settings than {CONFIG} has "
                f"now{changed}; put the value back ({back}), or train with the new one in a new folder: "
                f"latent-control run {run_dir / CONFIG} --run-dir NEW"
            )


def _relevant(config: Mapping[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """The values of these sections by dotted name, but for paths (what lies there may have moved) and ``HOW``."""
    data = {name: config[name] for name in sections if name in config}
    for _, _, put in list(path_fields(data)):
        put("")
    return {name: value for name, value in by_parts(data) if name.rpartition(".")[2] not in HOW}


def by_parts(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name, objects in lists by their parts, so that two configs can be compared by the names that
    both have: a later version knows more of them."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from by_parts(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        yield f"{prefix}, their number", len(tree)
        for place, item in enumerate(tree):
            yield from by_parts(item, f"{prefix}[{place}]")
    else:
        yield prefix, tree


def _values(text: str | None) -> dict[str, Any]:
    return dict(by_parts(read(text or "{}")[0]))


def _listed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """`` (improve.updates: 5 before, 8 now)``; "" where nothing differs."""
    names = [name for name in after if name in before and before[name] != after[name]]
    said = ", ".join(f"{name}: {before[name]} before, {after[name]} now" for name in names[:5])
    return f" ({said}{', ...' if len(names) > 5 else ''})" if names else ""


def _say(run_dir: Path, kind: str, text: str) -> None:
    _LOG.warning("%s: %s", run_dir, text)
    Events(run_dir).note(kind, text)


def _is_config(path: Path) -> bool:
    try:
        load_config(path, [], check_paths=False)
    except (ValueError, OSError):
        return False
    return True
