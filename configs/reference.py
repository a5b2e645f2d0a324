"""The reference of all settings as Markdown, made from the config's JSON Schema: ``docs/reference.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from configs.recipes import RECIPES, shown
from configs.renamed import RENAMED

HEAD = """# Reference: every setting

Made by `latent-control config reference` from the schema; a test keeps it so. `section.key` is what the command line
overrides (`latent-control run CONFIG improve.updates=300`). Sections that are `null` by default are left out of a run.
"""


def reference(schema: Mapping[str, Any]) -> str:
    """One table per section, in the order of the config, what each recipe fills, old names."""
    return "\n".join([HEAD, *_section("", schema, schema), *_recipes(), *_old_names()])


def _recipes() -> Iterator[str]:
    yield "## Recipes\n"
    yield "What `improve.recipe` fills unless it is set by hand; `latent-control config show` prints it.\n"
    yield from ("| recipe | settings |", "|---|---|")
    for name, settings in RECIPES.items():
        yield f"| `{name}` | {', '.join(f'`{place}: {shown(value)}`' for place, value in settings.items())} |"
    yield ""


def _old_names() -> Iterator[str]:
    yield "## Old names\n"
    yield "Still read, with a line on stderr that names the new one; both at once are an error.\n"
    yield from ("| old | new |", "|---|---|")
    yield from (f"| `{old}` | `{new}` |" for old, new in RENAMED.items())
    yield ""


def _section(path: str, node: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    """The settings of a section, then the sections in it."""
    plain, inner = [], []
    for name, setting in node["properties"].items():
        place, target = f"{path}.{name}".lstrip("."), _target(setting, schema)
        if target is None:
            plain.append(f"| `{place}` | {_kind(setting)} | {_default(name, setting, node)} | {_words(setting)} |")
        else:
            inner.append((place, target, setting))
    if path:
        yield f"## `{path}`\n"
        if node.get("description"):
            yield f"{_line(node['description'])}\n"
    if plain:
        yield from ("| setting | values | default | |", "|---|---|---|---|", *plain, "")
    for place, target, _ in inner:
        yield from _section(place, target, schema)


def _target(setting: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section a setting is, if it is one."""
    for choice in (setting, *setting.get("anyOf", ())):
        if "$ref" in choice:
            target = schema["$defs"][choice["$ref"].rpartition("/")[2]]
            return target if "properties" in target else None
    return None


def _kind(setting: Mapping[str, Any]) -> str:
    if "anyOf" in setting:
        return " or ".join(_kind(choice) for choice in setting["anyOf"])
    if "enum" in setting:
        return ", ".join(f"`{json.dumps(value)}`".replace('"', "") for value in setting["enum"])
    if "const" in setting:
        return f"`{setting['const']}`"
    if setting.get("type") == "array":
        return f"list of {_kind(setting.get('items', {}))}"
    kind = setting.get("type", "any")
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " ".join([kind, *(f"{sign} {setting[name]:g}" for name, sign in bounds.items() if name in setting)])


def _default(name: str, setting: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    return "**required**" if name in node.get("required", ()) else f"`{json.dumps(setting.get('default'))}`"


def _words(setting: Mapping[str, Any]) -> str:
    return _line(setting.get("description", "")).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())
