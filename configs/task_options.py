"""What the free options of tasks hold that others must know of: paths, and the Ray actors of reward models.

Raw data in, so that it works before anything is validated; nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_JUDGING = (("python", "path"), ("preference", "model"), ("judge", "cache"))
_FILES = ((None, "path"), (None, "heldout_path"), (None, "shots_path"), *_JUDGING)
TASK_PATHS: dict[str, tuple[tuple[str | None, str], ...]] = {
    **dict.fromkeys(("rows", "jsonl", "parquet"), _FILES),
    "dataset": ((None, "path"), (None, "shots_path"), *_JUDGING),
    "gsm8k": ((None, "path"), *_JUDGING),
    "math500": ((None, "path"), (None, "train"), *_JUDGING),
    "gateway": ((None, "program"), (None, "interpreter"), (None, "path"), (None, "heldout_path")),
    "verifiers": ((None, "python"), (None, "folder")),
}
"""Options that hold a path, by task (of ``gateway/...`` by what stands before the slash): the section of the options it
stands in, and its key."""


def task_paths(task: Any) -> Iterator[tuple[dict[str, Any], str, bool]]:
    """Mapping and key of each path among a raw task's options, those of a mixture's members too, and whether it may be
    a name instead: of the hub, or of a program.

    Options are free, so no schema marks them.
    """
    options = task.get("options") if isinstance(task, dict) else None
    if not isinstance(options, dict):
        return
    for member in _members(task, options):
        yield from task_paths(member)
    name = str(task.get("name"))
    for owner, key in TASK_PATHS.get(name if name in TASK_PATHS else name.partition("/")[0], ()):
        mapping = options if owner is None else options.get(owner)
        if isinstance(mapping, dict) and isinstance(mapping.get(key), str):
            named = key in ("model", "interpreter") or (task["name"] == "dataset" and key == "path")
            yield mapping, key, named


def preferences(task: Any) -> Iterator[dict[str, Any]]:
    """The ``preference`` section of a raw task, and of each of a mixture's members that has one."""
    yield from sections(task, "preference")


def sections(task: Any, name: str) -> Iterator[dict[str, Any]]:
    """The section of this name among a raw task's options, and among those of each of a mixture's members."""
    options = task.get("options") if isinstance(task, dict) else None
    if not isinstance(options, dict):
        return
    for member in _members(task, options):
        yield from sections(member, name)
    if isinstance(options.get(name), dict):
        yield options[name]


def reward_actors(task: Any, resource: str) -> float:
    """CPUs (``cpus_per_actor``) or GPUs (``gpus_per_actor``) that the reward models of a raw task ask for."""
    default = {"cpus_per_actor": 1.0, "gpus_per_actor": 0.0}[resource]
    return float(sum(section.get("actors", 1) * section.get(resource, default) for section in preferences(task)))


def _members(task: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    members = options.get("tasks") if task.get("name") == "mixture" else None
    return list(members) if isinstance(members, list | tuple) else []
