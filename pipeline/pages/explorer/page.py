"""The explorer's page: dataset and assets in one file that loads nothing from elsewhere.

Texts of models are hostile: they are embedded as JSON in which no ``<`` occurs, and the script puts them on the page as
text nodes alone. The Content-Security-Policy lets nothing run or load but this page's own style and script, named by
their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from pipeline.pages.explorer.records import Dataset, as_data
from pipeline.storage.atomic import write_atomic

SCRIPTS = ("state.js", "elements.js", "pictures.js", "codes.js", "rollouts.js", "policy.js", "beside.js", "main.js")
"""One after the other they are the page's script."""


def embedded(datasets: Sequence[Dataset]) -> str:
    """``{"runs": [...]}`` as ASCII JSON that can stand inside of a ``script`` element."""
    text = json.dumps({"runs": [as_data(dataset) for dataset in datasets]}, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def asset(name: str) -> str:
    """A file of ``assets``."""
    return (files("pipeline.pages.explorer") / "assets" / name).read_text(encoding="utf-8")


def source(text: str) -> str:
    """How a Content-Security-Policy names an inline style or script: by its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page(datasets: Sequence[Dataset]) -> str:
    """The whole page of one run, or of two side by side."""
    style, script = asset("explorer.css"), "\n".join(map(asset, SCRIPTS))
    rules = (
        f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {"POLICY": rules, "STYLE": style, "SCRIPT": script, "DATA": embedded(datasets)}
    return filled(asset("explorer.html"), parts)


def filled(frame: str, parts: Mapping[str, str]) -> str:
    """``frame`` with the ``parts`` at its marks ``{{NAME}}``."""
    before, *rest = frame.split("{{")
    # Cut at the marks of the frame alone: what is put in is never searched for marks.
    return before + "".join(parts[name] + after for name, _, after in (part.partition("}}") for part in rest))


def write_page(datasets: Sequence[Dataset], path: Path) -> Path:
    """Put the page at ``path`` whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page(datasets).encode("ascii", "xmlcharrefreplace"))
    return path
