"""HTML pages: one file each, in one look, made of data and scripts, that load nothing from elsewhere.

Texts of models are hostile: they are embedded as JSON in which no ``<`` occurs (or come from the service as JSON), and
the scripts put them on the page as text nodes alone. The Content-Security-Policy lets nothing run or load but the
page's own style and script, named by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from configs.plain_text import UNSEEN
from pipeline.pages.records import ReportPage, as_data

SHARED = ("elements.js", "uPlot.iife.min.js", "charts.js", "sections.js")
"""Scripts that every page begins with: elements, charts, and sections of a report."""
FRAMED = {"content-security-policy": "frame-ancestors 'none'"}
"""Header of pages that a service sends, beside what the page says itself."""
MAIN = (
    '<header id="header"><h1 id="title"></h1><nav id="runs" aria-label="Runs" hidden></nav><nav id="views" '
    'aria-label="Views"></nav></header><main id="main" tabindex="-1"><p>This page needs JavaScript; it loads nothing '
    "from elsewhere.</p></main>"
)


def asset(name: str, package: str = "pipeline.pages") -> str:
    """A file of a package's ``assets``."""
    return (files(package) / "assets" / name).read_text(encoding="utf-8")


def embedded(data: Any) -> str:
    """Records as ASCII JSON that can stand inside of a ``script`` element."""
    text = json.dumps(as_data(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def document(
    title: str, scripts: Sequence[str], data: str = "{}", *, style: str = "", body: str = MAIN, live: bool = False
) -> str:
    """A whole page in ASCII.

    Args:
        scripts: texts of the page's own scripts, after the ``SHARED`` ones.
        data: what they find on the page (``embedded``).
        live: sent by a local service, which the page may ask.
    """
    script = "\n".join((*map(asset, SHARED), *scripts))
    style = "\n".join((asset("uPlot.min.css"), asset("page.css"), style))
    rules = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data: blob:"
    parts = {
        "POLICY": f"{rules}; base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if live else ""),
        "TITLE": escape(UNSEEN.sub("\ufffd", title)),
        "STYLE": style,
        "BODY": body,
        "DATA": data,
        "SCRIPT": script,
        # Else a browser asks the service for an icon.
        "ICON": '<link rel="icon" href="data:,">' if live else "",
        "LIVE": " data-live" if live else "",
    }
    before, *rest = asset("frame.html").split("{{")
    # Cut at the marks of the frame alone: what is put in is never searched for marks.
    whole = before + "".join(parts[name] + after for name, _, after in (part.partition("}}") for part in rest))
    return whole.encode("ascii", "xmlcharrefreplace").decode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def report_page(report: ReportPage) -> str:
    """Sections with their lines, figures, tables and examples as a page."""
    return document(report.title, [asset("report.js")], embedded(report))
