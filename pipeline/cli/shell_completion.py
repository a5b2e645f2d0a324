"""What the shell completes: config files, run folders, and ``section.key=`` with its values.

Set up once by ``latent-control --install-completion``. Called at each press of the tab key, so nothing is imported
before it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from pipeline.runs.layout import CONFIG

BASH_SEPARATOR = "="
"""bash treats it as a separate word: ``improve.mode=a`` arrives as three."""


def config_files(incomplete: str) -> list[str]:
    """YAML files and folders with this prefix, and the configs that come with the program."""
    from configs.paths import packaged_configs

    found = [path for path in _paths(incomplete) if path.endswith((".yaml", ".yml", "/"))]
    return found + [name for name in packaged_configs() if name.startswith(incomplete)]


def run_folders(incomplete: str) -> list[str]:
    """Run folders, and folders above them, with this prefix; for a bare name those of ``runs/`` too."""
    found = [path for path in _paths(incomplete) if path.endswith("/")]
    runs = [] if "/" in incomplete else [path for path in _paths(f"runs/{incomplete}") if path.endswith("/")]
    ready = [path for path in (*found, *runs) if (Path(path) / CONFIG).is_file()]
    return [path.rstrip("/") for path in ready] or found


def overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completions of an override, after those that are typed already."""
    return override(list(ctx.params.get("overrides") or ()), incomplete)


def override(args: list[str], incomplete: str) -> list[str]:
    """``improve.up`` -> ``improve.updates=``; ``improve.mode=`` -> its values."""
    before = args[-1] if args else ""
    if incomplete == BASH_SEPARATOR:
        return _values(before, "")
    if before == BASH_SEPARATOR and len(args) > 1:
        return _values(args[-2], incomplete)
    key, equals, typed = incomplete.partition("=")
    if equals:
        return [f"{key}={value}" for value in _values(key, typed)]
    found = [f"{name}=" for name in _keys() if name.startswith(key)]
    if len(found) == 1:  # with a second choice the shell adds no space after an incomplete word
        name = found[0].rstrip("=")
        return [f"{name}={value}" for value in _values(name, "")] or found
    return found


def _paths(incomplete: str) -> list[str]:
    """Paths with this prefix; folders end with a slash."""
    folder, _, start = incomplete.rpartition("/")
    parent = Path(f"{folder}/" if folder or incomplete.startswith("/") else ".").expanduser()
    if not parent.is_dir():
        return []
    shown = f"{folder}/" if folder or incomplete.startswith("/") else ""
    names = sorted(
        path
        for path in parent.iterdir()
        if path.name.startswith(start) and (start.startswith(".") or path.name[0] != ".")
    )
    return [f"{shown}{path.name}{'/' if path.is_dir() else ''}" for path in names]


def _keys() -> list[str]:
    """Dotted names of all keys that hold a value."""
    from configs.complaints import known_keys, section_class

    return [name for name in dict.fromkeys(known_keys()) if section_class(tuple(name.split("."))) is None]


def _values(key: str, typed: str) -> list[str]:
    """Values of a key: all where they are named, true and false, or else the default."""
    from configs.complaints import section_class

    *parents, name = key.split(".")
    section = section_class(tuple(parents))
    field = section.model_fields.get(name) if section is not None else None
    if section is None or field is None:
        return []
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    choices = list(_choices(section.model_json_schema()["properties"][name]))
    if not choices and isinstance(default, int | float | str):
        choices = [str(default)]
    return [choice for choice in choices if choice.startswith(typed)]


def _choices(schema: dict[str, Any]) -> Iterator[str]:
    for option in (schema, *schema.get("anyOf", ())):
        yield from (str(value) for value in option.get("enum", ()))
        yield from (["true", "false"] if option.get("type") == "boolean" else [])
        yield from (["null"] if option.get("type") == "null" else [])
        yield from ([json.dumps(option["const"]).strip('"')] if "const" in option else [])
