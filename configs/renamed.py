"""Old names of config keys: they are read as the new ones, in users' files, finished runs and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from configs.yaml_text import Path

RENAMED = {"improve.aliases": "improve.equivalent_codes"}
"""Dotted old name -> new name; entries are added, never taken away."""
_LOG = logging.getLogger(__name__)


class Renaming(NamedTuple):
    """A key that stood under its old name."""

    old: Path
    new: Path
    value: Any
    both: bool
    """The new name is set as well; then the old one was only taken out."""


def rename(data: Any) -> list[Renaming]:
    """Move what ``data``, a config as read, has under old names to the new ones; what was found."""
    return list(_renamings(data))


def _renamings(data: Any) -> Iterator[Renaming]:
    for old, new in ((tuple(old.split(".")), tuple(new.split("."))) for old, new in RENAMED.items()):
        there, here = _section(data, old[:-1]), _section(data, new[:-1])
        if there is None or here is None or old[-1] not in there:
            continue
        value = there.pop(old[-1])
        both = value is not None and new[-1] in here
        if not both:
            here.setdefault(new[-1], value)
        yield Renaming(old, new, value, both)


def _section(data: Any, path: Path) -> dict[str, Any] | None:
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else None


@lru_cache
def hint(text: str) -> None:
    """Say a line on stderr, once in a process however often the file is read."""
    _LOG.warning("%s", text)
