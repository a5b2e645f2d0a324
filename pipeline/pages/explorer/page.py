"""The explorer's page: dataset and assets in one file that loads nothing from elsewhere.

Texts of models are hostile: they are embedded as JSON in which no ``<`` occurs, and the script puts them on the page as
text nodes alone. The Content-Security-Policy lets nothing run or load but this page's own style and script, named by
their hashes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline.pages.explorer.records import Code, Dataset, as_data
from pipeline.pages.html import asset, filled, scripted, source, styled
from pipeline.storage.atomic import write_atomic

SCRIPTS = (
    *(
        "state.js",
        "elements.js",
        "charts.js",
        "pictures.js",
        "codes.js",
        "rollouts.js",
        "why.js",
        "live.js",
        "policy.js",
    ),
    *("beside.js", "main.js"),
)
"""One after the other they are the page's script."""
_FIELDS = {field.name for field in fields(Code)}
_ICON = '\n<link rel="icon" href="data:,">'
"""Else a browser asks the service for one."""
_DATA = re.compile(r'<script type="application/json" id="data">([^<]*)</script>')


def embedded(datasets: Sequence[Dataset]) -> str:
    """``{"runs": [...]}`` as ASCII JSON that can stand inside of a ``script`` element."""
    return _escaped({"runs": [as_data(dataset) for dataset in datasets]})


def _escaped(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page(datasets: Sequence[Dataset]) -> str:
    """The whole page of one run, or of two side by side."""
    return _page(embedded(datasets), live=False)


def live_page(path: Path) -> str:
    """The page written at ``path``, as ``latent-control watch`` serves it: by today's script, which asks that service
    for what the file does not hold.

    Raises:
        ValueError: it is no page of the explorer, or of another version.
    """
    found = _DATA.search(path.read_text(encoding="utf-8"))
    data: Any = None
    try:
        data = json.loads(found[1]) if found else None
        whole = bool(data["runs"]) and all(run["codes"][0].keys() >= _FIELDS for run in data["runs"])
    except (ValueError, TypeError, LookupError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path} is no page of the explorer, or one of another version: latent-control explain {path.parent} "
            "writes it again"
        )
    return _page(_escaped(data), live=True)


def _page(data: str, *, live: bool) -> str:
    style, script = styled(), scripted(*map(asset, SCRIPTS))
    rules = (
        f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; base-uri 'none'; "
        "form-action 'none'" + ("; connect-src 'self'; img-src data:" if live else "")
    )
    parts = {"POLICY": rules, "STYLE": style, "SCRIPT": script, "DATA": data}
    served = {"ICON": _ICON, "LIVE": " data-live"} if live else {"ICON": "", "LIVE": ""}
    return filled(asset("explorer.html"), parts | served)


def write_page(datasets: Sequence[Dataset], path: Path) -> Path:
    """Put the page at ``path`` whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page(datasets).encode("ascii", "xmlcharrefreplace"))
    return path
