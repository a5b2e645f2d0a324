"""What configs say, and where they differ: by meaning, not by path."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from pipeline.tracking.uris import flatten

MEANINGLESS = ("seed", "tracking.", "cluster.", "explorer.", "report.", "replay.")
"""Keys that do not make another method: which random numbers, and what is kept of a run."""
ENDS = 1 << 20
"""Bytes of a file's start and end that make its hash."""


def meaning(config: RunConfig) -> dict[str, str]:
    """The config by dotted key; what names a file or folder of this machine is its content's hash."""
    return {key: _content(str(value)) for key, value in flatten(config.model_dump(mode="json")).items()}


def _content(value: str) -> str:
    path = Path(value)
    try:
        if not path.is_absolute() or not path.exists():
            return value
        files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
        found = hashlib.sha256()
        for one in files:
            found.update(f"{one.relative_to(path)} {one.stat().st_size} ".encode())
            with one.open("rb") as file:
                found.update(file.read(ENDS))
                file.seek(max(0, one.stat().st_size - ENDS))
                found.update(file.read(ENDS))
    except OSError:
        return value
    return f"{path.name} ({found.hexdigest()[:12]})"


def method_of(config: RunConfig) -> str:
    """Equal for configs of one method."""
    return repr(sorted((key, value) for key, value in meaning(config).items() if not key.startswith(MEANINGLESS)))


def differing(found: Sequence[Mapping[str, str]], meaningless: Sequence[str] = MEANINGLESS) -> list[dict[str, Any]]:
    """Keys that differ among ``meaning``s, but for ``meaningless`` ones, with the value of each."""
    keys = sorted({key for one in found for key in one if not key.startswith(tuple(meaningless))})
    rows = [(key, [one.get(key, "(absent)") for one in found]) for key in keys]
    return [{"key": key, "values": values} for key, values in rows if len(set(values)) > 1]
