"""Paths in a config: which fields hold one, what they are relative to, and what to say when nothing is there."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from configs.task_options import task_paths
from configs.yaml_text import Path as KeyPath
from configs.yaml_text import dotted

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
BASE_MODEL: KeyPath = ("base", "model")
MODELS: tuple[KeyPath, ...] = (BASE_MODEL, ("evaluation", "embedder"))
"""Fields that may hold the hub id of a model instead of a path."""
BUNDLED = "smollm2-135m-instruct"
PACKAGED = Path(__file__).resolve().parent
"""The folder of the configs that come with the program, known by their bare names from any folder."""


def packaged_configs() -> dict[str, Path]:
    """``{"quickstart": <this folder>/quickstart.yaml, ...}``."""
    return {path.stem: path for path in sorted(PACKAGED.glob("*.yaml"))}


def packaged_config(given: Path) -> Path | None:
    """The packaged config that ``given`` names; ``None`` where a file is there, or it is not a bare name of one."""
    return None if given.is_file() else packaged_configs().get(str(given).removesuffix(".yaml"))


def path_fields(data: Any) -> Iterator[tuple[KeyPath, str, Callable[[str], None]]]:
    """Key path, value and setter of each path in raw config data (not yet validated, so anything may be anywhere)."""
    schema = _schema()
    yield from _fields(data, schema, schema["$defs"], ())


@cache
def _schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def _fields(
    data: Any, schema: dict[str, Any], defs: dict[str, Any], at: KeyPath
) -> Iterator[tuple[KeyPath, str, Callable[[str], None]]]:
    schema = _follow(schema, defs)
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _child(data, key, value, schema.get("properties", {}).get(key), defs, at)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _child(data, index, value, schema.get("items"), defs, at)


def _child(
    owner: Any, key: Any, value: Any, schema: dict[str, Any] | None, defs: dict[str, Any], at: KeyPath
) -> Iterator[tuple[KeyPath, str, Callable[[str], None]]]:
    if schema is None:
        return
    place = (*at, key)
    if isinstance(value, str) and any(s.get("format") == "path" for s in (schema, *schema.get("anyOf", ()))):
        yield place, value, lambda new: owner.__setitem__(key, new)
    yield from _fields(value, schema, defs, place)


def _follow(schema: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """The object or list behind ``X | None`` and references."""
    for option in (schema, *schema.get("anyOf", ()), *schema.get("allOf", ())):
        if "$ref" in option:
            return _follow(defs[option["$ref"].rpartition("/")[2]], defs)
        if "properties" in option or "items" in option:
            return option
    return schema


def is_hub_id(value: str) -> bool:
    """``org/name`` or ``name`` that is no folder: a model of the hub, or the bundled one."""
    return HUB_ID.fullmatch(value) is not None


def resolve_paths(data: Any, folder: Path) -> None:
    """Make the paths in raw config data absolute, in place; hub ids stay."""
    trained = _base_is_trained(data)
    for place, value, put in path_fields(data):
        path = Path(value).expanduser()
        if path.is_absolute():
            put(str(path))
        elif (trained and place == BASE_MODEL) or not (
            place in MODELS and is_hub_id(value) and not _meant_as_path(folder, path)
        ):
            put(str((folder / path).resolve()))
    _resolve_tasks(data, folder)


def resolve_packaged(data: Any) -> None:
    """The paths of a packaged config: models that come with it lie in its folder; what runs leave behind (``../runs``,
    a base LM to train) lies where it would if the packages were in the working folder, and never in the package."""
    resolve_paths(data, PACKAGED)
    trained, above = _base_is_trained(data), PACKAGED.parent
    for place, value, put in path_fields(data):
        path = Path(value)
        made = not path.is_relative_to(PACKAGED) or (trained and place == BASE_MODEL)
        if path.is_relative_to(above) and made:
            put(str(Path.cwd() / path.relative_to(above)))


def _resolve_tasks(data: Any, folder: Path) -> None:
    """The paths of every task in raw config data, the run's own and those of data sources."""
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    for child in children:
        _resolve_tasks(child, folder)
    for options, key, may_be_id in task_paths(data.get("task")) if isinstance(data, dict) else ():
        path = Path(options[key]).expanduser()
        if not (may_be_id and is_hub_id(options[key]) and not _meant_as_path(folder, path)):
            options[key] = os.path.abspath(folder / path)  # as it is: a link to an interpreter is its environment


def _meant_as_path(folder: Path, path: Path) -> bool:
    """``models/countdown-1n`` is a slip of a path where ``models/`` is a folder, and not the hub's."""
    return (folder / path).exists() or (len(path.parts) > 1 and (folder / path.parts[0]).is_dir())


def _base_is_trained(data: Any) -> bool:
    """Then ``base.model`` is the folder to write."""
    base = data.get("base") if isinstance(data, dict) else None
    return isinstance(base, dict) and base.get("train") is not None


def missing_paths(data: Any) -> list[str]:
    """A message for each path in resolved raw data where nothing is; a base LM that is about to be trained may be
    missing."""
    trained = _base_is_trained(data)
    messages = []
    for place, value, _ in path_fields(data):
        if place in MODELS and ((trained and place == BASE_MODEL) or is_hub_id(value)):
            near = difflib.get_close_matches(value.lower(), [BUNDLED], n=1, cutoff=0.8)
            if near and value != BUNDLED and not trained:
                messages.append(f"{dotted(place)}: {value} is unknown; did you mean {BUNDLED}?")
        elif not Path(value).exists():
            messages.append(f"{dotted(place)}: {nothing_at(Path(value))}")
    return messages


def nothing_at(path: Path) -> str:
    """``<path> does not exist`` and the nearest name in the deepest folder on the way that does exist."""
    parent, wrong = path.parent, path
    while not parent.is_dir() and parent != parent.parent:
        parent, wrong = parent.parent, parent
    try:
        names = [p.name for p in parent.iterdir()]
    except OSError:
        names = []
    near = difflib.get_close_matches(wrong.name, names, n=1, cutoff=0.6)
    if near:
        return f"{path} does not exist; did you mean {parent / near[0] / path.relative_to(wrong)}?"
    return f"{path} does not exist" + (
        f" (there is no {wrong.name} in {parent})"
        if parent != path.parent
        else f" ({parent} exists, {path.name} does not)"
    )
