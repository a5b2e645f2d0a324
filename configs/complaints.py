"""Validation errors as sentences: the place, what was expected, the value found, and the nearest known key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from configs.schema import RunConfig, Section
from configs.yaml_text import Path, dotted

# pydantic's error type -> what we expected; {name} is filled from the error's context.
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "model_type": "a section with keys of its own",
    "dict_type": "a mapping, e.g. {{key: value}}",
    "tuple_type": "a list, e.g. [{{kind: task}}]",
    "list_type": "a list",
}
MISSING: dict[Path, str] = {
    ("base",): "base: {model: models/countdown-1m}",
    ("base", "model"): "base.model: models/countdown-1m",
}


def shown(value: Any) -> str:
    """A value as the user wrote it, shortened, with its YAML type."""
    kind = {
        bool: "true/false",
        int: "number",
        float: "number",
        str: "text",
        list: "list",
        dict: "mapping",
        type(None): "null",
    }.get(type(value))
    text = "null" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text if kind in (None, "null") else f"{text} ({kind})"


def complaint(error: ErrorDetails) -> str:
    """One sentence for one pydantic error, without the line number."""
    path: Path = error["loc"]
    if error["type"] == "extra_forbidden":
        return unknown_key(path)
    if error["type"] == "missing":
        example = MISSING.get(path)
        return f"{dotted(path)}: missing" + (f"; e.g. {example}" if example else "; give it a value")
    template = EXPECTED.get(error["type"])
    if template is None:
        return f"{dotted(path)}: {error['msg'].removeprefix('Value error, ')}, got {shown(error['input'])}"
    hint = _near_word(error) if error["type"] == "literal_error" else ""
    return f"{dotted(path)}: expected {template.format(**error.get('ctx', {}))}, got {shown(error['input'])}{hint}"


def _near_word(error: ErrorDetails) -> str:
    words = re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", ""))
    near = difflib.get_close_matches(str(error["input"]), words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def section_class(path: Path) -> type[Section] | None:
    """The section at ``path``; list positions are stepped over."""
    current: type[Section] = RunConfig
    for part in path:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        nested = next(_sections_of(field.annotation), None) if field else None
        if nested is None:
            return None
        current = nested
    return current


def _sections_of(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_of(argument)


def known_keys(section: type[BaseModel] = RunConfig, at: str = "") -> Iterator[str]:
    """Dotted names of all keys, sections included; lists contribute the keys of their items."""
    for name, field in section.model_fields.items():
        place = f"{at}.{name}" if at else name
        yield place
        for nested in _sections_of(field.annotation):
            yield from known_keys(nested, place)


def unknown_key(path: Path) -> str:
    """Says where the key belongs, or what it was meant to be, or which keys there are."""
    *parents, key = path
    place, section = dotted(path), section_class(tuple(parents)) or RunConfig
    everywhere = list(known_keys())
    owners = sorted(
        (k for k in everywhere if k.rpartition(".")[2] == key), key=lambda k: (k.count("."), everywhere.index(k))
    )
    if owners:
        return f"{place}: unknown here; did you mean {_either(owners[:6])}?"
    at = dotted(tuple(parents))
    near = difflib.get_close_matches(str(key), section.model_fields, n=1, cutoff=0.6)
    if near:
        return f"{place}: unknown; did you mean {f'{at}.{near[0]}' if at else near[0]}?"
    names = {k.rpartition(".")[2]: k for k in reversed(everywhere)}
    far = difflib.get_close_matches(str(key), names, n=1, cutoff=0.75)
    if far:
        return f"{place}: unknown; did you mean {names[far[0]]}?"
    return f"{place}: unknown; {at or 'the top level'} has {', '.join(section.model_fields)}"


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" or {names[-1]}"
