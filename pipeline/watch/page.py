"""The page of ``watch``: one document without anything from elsewhere, made of the explorer's look and helpers and its
own script. Texts of models and tasks are hostile: they come as JSON and enter the page as text nodes alone."""

from __future__ import annotations

from functools import cache, partial

from pipeline.pages.html import asset, filled, served_policy

SCRIPTS = ("state.js", "chart.js", "rollouts.js", "main.js")
"""One after the other, with the explorer's helpers after the first, they are the page's script."""

_asset = partial(asset, package="pipeline.watch")


@cache
def page() -> tuple[str, str]:
    """The document, and the Content-Security-Policy to send with it."""
    first, *rest = map(_asset, SCRIPTS)
    style, script = asset("explorer.css") + _asset("watch.css"), "\n".join([first, asset("elements.js"), *rest])
    return filled(_asset("watch.html"), {"STYLE": style, "SCRIPT": script}), served_policy(style, script)
