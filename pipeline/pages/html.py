"""Parts of the pages: assets, marks in frames, and the hashes that a Content-Security-Policy names."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files


def asset(name: str, package: str = "pipeline.pages.explorer") -> str:
    """A file of a package's ``assets``."""
    return (files(package) / "assets" / name).read_text(encoding="utf-8")


def source(text: str) -> str:
    """The name of an inline style or script in a Content-Security-Policy: its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def filled(frame: str, parts: Mapping[str, str]) -> str:
    """``frame`` with the ``parts`` at its marks ``{{NAME}}``."""
    before, *rest = frame.split("{{")
    # Cut at the marks of the frame alone: what is put in is never searched for marks.
    return before + "".join(parts[name] + after for name, _, after in (part.partition("}}") for part in rest))
