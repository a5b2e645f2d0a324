"""Configuration of the documentation site: ``sphinx-build -W -b html docs docs/_build``."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the API reference is of this checkout

project = "latent-control"
author = "latent-control maintainers"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_copyright = False
html_title = f"{project} {release}"
highlight_language = "none"
myst_heading_anchors = 4
autosummary_generate = False
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

# Files outside docs/ that the site shows: page -> file. The page in docs/ holds a link, for readers without the site.
SHOWN = {"benchmarks": "benchmarks/README.md", "changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
SHOWN |= {"security": "SECURITY.md"}
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def show_files_of_the_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replaces a page of ``SHOWN`` by its file, and points links to such files at the pages."""
    path = ROOT / SHOWN[docname] if docname in SHOWN else Path(app.env.doc2path(docname))
    text = path.read_text(encoding="utf-8") if docname in SHOWN else source[0]
    app.env.note_dependency(str(path), docname=docname)
    here = (ROOT / "docs" / docname).parent
    pages = {ROOT / file: ROOT / "docs" / f"{page}.md" for page, file in SHOWN.items()}

    def target(found: re.Match[str]) -> str:
        linked = (path.parent / found[1]).resolve()
        if not linked.is_relative_to(ROOT / "docs") and linked not in pages:
            return found[0]
        page = pages.get(linked, linked)
        return f"]({os.path.relpath(page, here)}{found[2] or ''})"

    source[0] = LINK.sub(target, text)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", show_files_of_the_repository)
