"""The explorer's page: dataset and scripts in one file that loads nothing from elsewhere (``pipeline.pages.page``)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline.pages import page as pages
from pipeline.pages.explorer.records import Code, Dataset
from pipeline.storage.atomic import write_atomic

SCRIPTS = ("pictures.js", "codes.js", "rollouts.js", "why.js", "live.js", "policy.js", "beside.js", "main.js")
"""One after the other they are the page's script."""
_FIELDS = {field.name for field in fields(Code)}
_DATA = re.compile(r'<script type="application/json" id="data">([^<]*)</script>')


def page(datasets: Sequence[Dataset]) -> str:
    """The whole page of one run, or of two side by side."""
    return _document({"runs": datasets})


def read_page(path: Path) -> Any:
    """What is embedded in the page written at ``path``.

    Raises:
        ValueError: it is no page of the explorer, or of another version.
    """
    found = _DATA.search(path.read_text(encoding="utf-8"))
    data: Any = None
    try:
        data = json.loads(found[1]) if found else None
        whole = bool(data["runs"]) and all(
            "clusters" in run and run["codes"][0].keys() >= _FIELDS for run in data["runs"]
        )
    except (ValueError, TypeError, LookupError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path} is not a page of the explorer, or one of another version: latent-control explain {path.parent} "
            "writes it again"
        )
    return data


def live_page(path: Path) -> str:
    """The page written at ``path``, as ``latent-control watch`` serves it: by today's script, which asks that service
    for what the file does not hold. ``ValueError`` as of ``read_page``."""
    return _document(read_page(path), live=True)


def _document(data: Any, *, live: bool = False) -> str:
    scripts = [pages.asset(name, "pipeline.pages.explorer") for name in SCRIPTS]
    return pages.document("Explorer", scripts, pages.embedded(data), live=live)


def write_page(datasets: Sequence[Dataset], path: Path) -> Path:
    """Put the page at ``path`` whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page(datasets).encode())
    return path
