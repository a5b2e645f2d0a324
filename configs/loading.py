"""From a YAML file and ``section.key=value`` overrides to a ``RunConfig``, or to all that is wrong at once."""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from configs.checks import cross_field_problems
from configs.complaints import complaint, section_class, shown, unknown_key
from configs.paths import (
    BUNDLED,
    missing_paths,
    nothing_at,
    packaged_config,
    packaged_configs,
    resolve_packaged,
    resolve_paths,
)
from configs.recipes import fill
from configs.renamed import hint, rename
from configs.schema import RunConfig, TaskConfig
from configs.yaml_text import Path as KeyPath
from configs.yaml_text import YamlProblem, dotted, read, write

LARGEST = 1 << 20
"""Bytes of a config file."""


class ConfigErrors(ValueError):
    """All problems of a config. ``partial`` is the config without its wrong values, when that makes one: more can be
    checked on it."""

    def __init__(self, messages: Sequence[str], partial: RunConfig | None = None, dropped: Sequence[str] = ()) -> None:
        super().__init__("\n".join(messages))
        self.messages = list(messages)
        self.partial = partial
        self.dropped = list(dropped)
        """Dotted names of the wrong values for which ``partial`` has the default."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True) -> RunConfig:
    """The config in ``path`` with ``overrides`` (``improve.updates=3``; values are YAML) applied, what its recipe says
    filled in, its paths absolute.

    Relative paths, those in overrides too, are relative to the folder of the file. Where no file is at ``path`` and it
    is the bare name of a config that comes with the program (``quickstart``), that one is taken, and overrides are
    relative to the working folder. ``check_paths=False`` leaves out whether anything is there (a finished stage's
    input may be gone).

    Raises:
        ConfigErrors: with one message for each problem.
    """
    path = Path(path)
    packaged = packaged_config(path)
    file = _read_file(packaged or path)
    if packaged is not None:
        resolve_packaged(file[0])
    return _load(path, file, overrides, Path() if packaged is not None else path.parent, check_paths)


def load_part(
    path: Path,
    overrides: Sequence[str],
    *,
    fixed: Mapping[str, Any],
    defaults: Mapping[str, Mapping[str, Any]],
    own: Mapping[str, type],
) -> tuple[RunConfig, dict[str, Any]]:
    """The config of a file that holds some of its sections, and the file's values of keys that are no config's.

    Args:
        fixed: sections that neither the file nor overrides may have; paths in them are absolute.
        defaults: values of sections where the file has others.
        own: keys that are no config's, with the type of each.

    Raises:
        ConfigErrors: with one message for each problem.
    """
    data, lines, messages = _read_file(path)
    values = {key: data.pop(key) for key in own if key in data}
    messages += [
        f"{key}: expected {'a text' if own[key] is str else own[key].__name__}, got {shown(value)}"
        for key, value in values.items()
        if not isinstance(value, own[key])
    ]
    given = {*data, *(override.partition("=")[0].partition(".")[0].strip() for override in overrides)}
    messages += [f"{key}: is not for a task to say; leave it out" for key in fixed if key in given]
    for key, section in defaults.items():
        below = data.setdefault(key, {})
        if isinstance(below, dict):
            data[key] = {**section, **below}
    return _load(path, (data | dict(fixed), lines, messages), overrides, path.parent, True), values


def _load(
    path: Path,
    file: tuple[dict[str, Any], dict[KeyPath, int], list[str]],
    overrides: Sequence[str],
    folder: Path,
    check_paths: bool,
) -> RunConfig:
    """The config of (values, lines, what is wrong already) of ``path``; its paths are relative to ``folder``."""
    data, lines, messages = file
    origins: dict[KeyPath, str] = {place: f"line {line}" for place, line in lines.items()}
    for override in overrides:
        messages += _apply(data, override, origins)
    messages += _renamed(path, data, origins)
    fill(data)
    messages += [f"{dotted(place)}: expected a finite number, got {value}" for place, value in _not_finite(data, ())]
    resolve_paths(data, folder)
    config, wrong = _validate(data)
    messages += [_with_origin(complaint(error), error["loc"], origins) for error in wrong]
    if check_paths:
        messages += missing_paths(data)
    if config is not None:
        messages += cross_field_problems(config)
    if messages:
        partial = config if config is not None else _without(data, wrong)
        raise ConfigErrors(
            list(dict.fromkeys(messages)),
            partial,
            [dotted(error["loc"]) for error in wrong if error["type"] != "extra_forbidden"],
        )
    assert config is not None
    return config


def load_task(name: str, overrides: Sequence[str], folder: Path) -> TaskConfig:
    """The task ``name`` with overrides such as ``task.options.numbers=4``; relative paths are relative to ``folder``.

    Raises:
        ConfigErrors: with one message for each problem.
    """
    data: dict[str, Any] = {"base": {"model": BUNDLED}, "task": {"name": name}}
    messages = [message for override in overrides for message in _apply(data, override, {})]
    resolve_paths(data, folder)
    config, wrong = _validate(data)
    messages += [complaint(error) for error in wrong]
    if config is None or messages:
        raise ConfigErrors(messages)
    return config.task


def dump_config(config: RunConfig) -> str:
    """YAML with every field, defaults included; ``load_config`` reads the same config from it."""
    return write(config.model_dump(mode="json"))


def config_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | RunConfig.model_json_schema()


def _read_file(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int], list[str]]:
    try:
        if path.is_file() and path.stat().st_size > LARGEST:
            raise ConfigErrors(
                [f"{path} has {path.stat().st_size} bytes, a config at most {LARGEST}; give the YAML file"]
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigErrors([f"no config file: {nothing_at(path.absolute())}{_packaged_hint(path)}"]) from None
    except IsADirectoryError:
        raise ConfigErrors([f"{path} is a folder; give the YAML file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigErrors([f"cannot read {path}: {error}"]) from error
    try:
        data, lines, duplicates = read(text)
    except YamlProblem as error:
        raise ConfigErrors([f"{path}: not valid YAML: {error}"]) from error
    if not isinstance(data, dict):
        raise ConfigErrors([f"{path}: expected a mapping of sections (base: ..., actions: ...), got {shown(data)}"])
    return data, lines, duplicates


def _renamed(path: Path, data: dict[str, Any], origins: dict[KeyPath, str]) -> list[str]:
    """Read old names of keys as the new ones; says so in one line, and returns what is set under both."""
    problems = []
    for old, new, value, both in rename(data):
        if both:
            text = f"{dotted(old)}: the old name of {dotted(new)}, and both are set; leave {dotted(old)} out"
            problems.append(_with_origin(text, old, origins))
        elif value is not None:
            hint(f"{path}: {dotted(old)} is now called {dotted(new)}; the old name is still read")
        if old in origins:
            origins.setdefault(new, origins.pop(old))
    return problems


def _packaged_hint(path: Path) -> str:
    """Of a file that is not there: the packaged config with that name, or with which names there are some."""
    names = packaged_configs()
    if path.stem in names:
        return f"; {path.stem} alone takes the config of that name that comes with this program"
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}, which comes with this program?"
    return f"; those that come with this program: {', '.join(names)}" if len(path.parts) == 1 else ""


def _apply(data: dict[str, Any], override: str, origins: dict[KeyPath, str]) -> list[str]:
    """Set one override in ``data``; absent sections on the way are made. Returns what is wrong with it."""
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        return [f"override {override!r}: expected section.key=value, e.g. improve.updates=3"]
    try:
        value, _, duplicates = read(text)
    except YamlProblem as error:
        return [f"override {override!r}: the value is not valid YAML: {error}"]
    target, parents = data, keys[:-1]
    for depth, key in enumerate(parents, start=1):
        if (
            section_class(keys[:depth]) is None
            and not isinstance(target.get(key), dict)
            and not _free_mapping(keys[:depth])
        ):
            return [_with_origin(_not_a_section(keys, depth), (), {(): f"override {override}"})]
        below = target.get(key)
        if below is None:
            below = target[key] = {}
        if not isinstance(below, dict):
            owner = dotted(keys[:depth])
            return [
                f"override {override!r}: {owner} is {shown(below)} with no keys of its own; give it whole, {owner}=..."
            ]
        target = below
    target[keys[-1]] = value
    for place in [place for place in origins if place[: len(keys)] == keys]:
        del origins[place]
    origins[keys] = f"override {override}"
    return [f"override {override!r}: {message}" for message in duplicates]


def _not_a_section(keys: KeyPath, depth: int) -> str:
    parent, name = section_class(keys[: depth - 1]), keys[depth - 1]
    if parent is not None and name in parent.model_fields:
        return f"{dotted(keys)}: {dotted(keys[:depth])} has no keys of its own"
    return unknown_key(keys[:depth])


def _free_mapping(keys: KeyPath) -> bool:
    """Whether ``keys`` lead into a mapping with free keys, such as ``task.options``."""
    for depth in range(1, len(keys) + 1):
        section = section_class(keys[: depth - 1])
        field = section.model_fields.get(str(keys[depth - 1])) if section else None
        if field is not None and str(field.annotation).startswith("dict["):
            return True
    return False


def _not_finite(value: Any, at: KeyPath) -> Iterator[tuple[KeyPath, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield at, value
    elif isinstance(value, Mapping | list):
        for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _not_finite(child, (*at, key))


def _validate(data: Any) -> tuple[RunConfig | None, list[ErrorDetails]]:
    # Strict JSON mode: "3" is no number and true is no 1, yet lists become tuples and 1 a float.
    try:
        return RunConfig.model_validate_json(json.dumps(data, default=str), strict=True), []
    except ValidationError as error:
        return None, error.errors(include_url=False, include_context=True)


def _without(data: dict[str, Any], wrong: Sequence[ErrorDetails]) -> RunConfig | None:
    """The config that is left when the wrong values fall back to their defaults; None when that is none."""
    data = copy.deepcopy(data)
    for error in wrong:
        *parents, last = error["loc"]
        target: Any = data
        for key in parents:
            target = (
                target[int(key)]
                if isinstance(target, list)
                else target.get(key, {})
                if isinstance(target, dict)
                else {}
            )
        if isinstance(target, dict):
            target.pop(last, None)
    return _validate(data)[0]


def _with_origin(message: str, place: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """Append where the value was written: the line of the nearest key on the way to it, or the override."""
    for depth in range(len(place), -1, -1):
        if place[:depth] in origins:
            return f"{message} [{origins[place[:depth]]}]"
    return message
