"""The steering page: one document without anything from elsewhere, made of the explorer's look and helpers and its own
script.

Texts of models and tasks are hostile: they come as JSON and enter the page as text nodes alone. The
Content-Security-Policy, sent as a header, lets nothing run but this style and script, and lets them talk to this
service only.
"""

from __future__ import annotations

from functools import cache, partial

from pipeline.pages.html import asset, filled, served_policy

SCRIPTS = ("state.js", "answer.js", "candidates.js", "main.js")
"""One after the other, with the explorer's helpers after the first, they are the page's script."""


_asset = partial(asset, package="pipeline.steering")


@cache
def parts() -> dict[str, str]:
    """Style and script."""
    first, *rest = map(_asset, SCRIPTS)
    return {
        "STYLE": asset("explorer.css") + _asset("steering.css"),
        "SCRIPT": "\n".join([first, asset("elements.js"), *rest]),
    }


def policy() -> str:
    """The Content-Security-Policy."""
    return served_policy(parts()["STYLE"], parts()["SCRIPT"])


def page() -> str:
    """The whole document."""
    return filled(_asset("steering.html"), parts())
