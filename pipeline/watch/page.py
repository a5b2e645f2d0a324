"""The page of ``watch``: one document without anything from elsewhere, made of the explorer's look and helpers and its
own script. Texts of models and tasks are hostile: they come as JSON and enter the page as text nodes alone."""

from __future__ import annotations

from functools import cache, partial

from pipeline.pages.html import asset, filled, scripted, served_policy, styled

SCRIPTS = ("state.js", "rollouts.js", "compare.js", "main.js")
"""One after the other, with the explorer's ``SHARED`` after the first, they are the page's script."""
SHARED = ("elements.js", "charts.js", "why.js")

_asset = partial(asset, package="pipeline.watch")


@cache
def page() -> tuple[str, str]:
    """The document, and the Content-Security-Policy to send with it."""
    first, *rest = map(_asset, SCRIPTS)
    style, script = styled(_asset("watch.css")), scripted(first, *map(asset, SHARED), *rest)
    return filled(_asset("watch.html"), {"STYLE": style, "SCRIPT": script}), served_policy(style, script)
