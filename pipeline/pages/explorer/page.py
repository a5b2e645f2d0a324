"""The explorer's page: dataset and assets in one file that loads nothing from elsewhere.

Texts of models are hostile: they are embedded as JSON in which no ``<`` occurs, and the script puts them on the page as
text nodes alone. The Content-Security-Policy lets nothing run or load but this page's own style and script, named by
their hashes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.pages.explorer.records import Dataset, as_data
from pipeline.pages.html import asset, filled, source
from pipeline.storage.atomic import write_atomic

SCRIPTS = ("state.js", "elements.js", "pictures.js", "codes.js", "rollouts.js", "policy.js", "beside.js", "main.js")
"""One after the other they are the page's script."""


def embedded(datasets: Sequence[Dataset]) -> str:
    """``{"runs": [...]}`` as ASCII JSON that can stand inside of a ``script`` element."""
    text = json.dumps({"runs": [as_data(dataset) for dataset in datasets]}, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page(datasets: Sequence[Dataset]) -> str:
    """The whole page of one run, or of two side by side."""
    style, script = asset("explorer.css"), "\n".join(map(asset, SCRIPTS))
    rules = (
        f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {"POLICY": rules, "STYLE": style, "SCRIPT": script, "DATA": embedded(datasets)}
    return filled(asset("explorer.html"), parts)


def write_page(datasets: Sequence[Dataset], path: Path) -> Path:
    """Put the page at ``path`` whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page(datasets).encode("ascii", "xmlcharrefreplace"))
    return path
