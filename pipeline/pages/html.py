"""Parts of the pages: assets, marks in frames, and the hashes that a Content-Security-Policy names."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files


def asset(name: str, package: str = "pipeline.pages.explorer") -> str:
    """A file of a package's ``assets``."""
    return (files(package) / "assets" / name).read_text(encoding="utf-8")


def styled(*sheets: str) -> str:
    """The style sheet of a page with charts: uPlot's, the common one, and the page's own."""
    return "\n".join((asset("uPlot.min.css", "pipeline.pages"), asset("explorer.css"), *sheets))


def scripted(first: str, *rest: str) -> str:
    """The script of a page with charts: the page's own, uPlot's after the part that makes it strict."""
    return "\n".join((first, asset("uPlot.iife.min.js", "pipeline.pages"), *rest))


def source(text: str) -> str:
    """The name of an inline style or script in a Content-Security-Policy: its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def served_policy(style: str, script: str) -> str:
    """The Content-Security-Policy of a page that a local service sends: it runs this style and script alone, and they
    talk to that service only."""
    own = f"style-src {source(style)}; script-src {source(script)}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def filled(frame: str, parts: Mapping[str, str]) -> str:
    """``frame`` with the ``parts`` at its marks ``{{NAME}}``."""
    before, *rest = frame.split("{{")
    # Cut at the marks of the frame alone: what is put in is never searched for marks.
    return before + "".join(parts[name] + after for name, _, after in (part.partition("}}") for part in rest))
