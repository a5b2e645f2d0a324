"""YAML as the configs use it: the 1.2 meaning of plain words, line numbers, and duplicate keys as errors.

PyYAML follows YAML 1.1, where ``no`` is false (``mixed_precision: no``) and ``1e-3`` is a text. Here only ``true`` and
``false`` are truth values, and every spelling of a number is a number.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Keys and list positions from the top of the file, e.g. ``("actions", "data", 0, "kind")``."""


MOST_NODES = 100_000
"""Keys and list items, those of aliases counted wherever they stand: a few lines can say billions."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the 1.2 core schema's plain scalars."""


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads back unchanged."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Unquoted, these three would be read back as line ends.
    odd = any(separator in text for separator in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else None)


_Dumper.add_representer(str, _text)


def _plain_scalars(owner: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    owner.yaml_implicit_resolvers = {}
    for tag, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("int", r"[-+]?[0-9]+", "-+0123456789"),
        (
            "float",
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
            "-+.0123456789",
        ),
    ):
        owner.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first))


_plain_scalars(_Loader)
_plain_scalars(_Dumper)
# YAML 1.1 reads 010 as eight; people mean ten.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


class YamlProblem(ValueError):
    """The text is no YAML; the message names the line."""


def read(text: str) -> tuple[Any, dict[Path, int], list[str]]:
    """Value, line of each key (from 1), and one message for each key written twice.

    Raises:
        YamlProblem: a syntax error.
    """
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # control characters
        raise YamlProblem(_one_line(error)) from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}, []
        lines: dict[Path, int] = {}
        duplicates: list[str] = []
        _walk(node, (), lines, duplicates)
        return loader.construct_document(node), lines, duplicates
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number of 5000 digits
        raise YamlProblem(_one_line(error)) from error
    finally:
        loader.dispose()


def _walk(node: yaml.Node, at: Path, lines: dict[Path, int], duplicates: list[str]) -> None:
    if len(lines) > MOST_NODES:
        raise YamlProblem(f"more than {MOST_NODES} keys and list items; write fewer, or fewer aliases (*name)")
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[(*at, index)] = child.start_mark.line + 1
            _walk(child, (*at, index), lines, duplicates)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise YamlProblem(f"line {key.start_mark.line + 1}: a key must be a word, not a list or mapping")
            place, line = (*at, key.value), key.start_mark.line + 1
            if place in lines:
                duplicates.append(f"{dotted(place)}: written twice, in lines {lines[place]} and {line}; keep one")
            lines[place] = line
            _walk(child, place, lines, duplicates)


def _one_line(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    context = f" ({error.context})" if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}"


def dotted(path: Path) -> str:
    """``actions.data[0].kind`` for ``("actions", "data", 0, "kind")``."""
    words = ""
    for part in path:
        words += f"[{part}]" if isinstance(part, int) else f".{part}" if words else str(part)
    return words


def write(value: Any) -> str:
    """Block-style YAML with the keys in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
