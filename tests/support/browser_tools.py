"""A headless chromium for the tests of pages, and tabs that remember what goes wrong on them.

Needs ``pip install playwright`` and a chromium on the path; AXE_CORE may name axe-core's ``axe.min.js`` (``npm pack
axe-core``).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser for the length of a block."""
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def watched(browser: Any, *own: str) -> Any:
    """A new tab; its ``wrong`` collects errors, warnings, and requests to addresses that begin with none of ``own``."""
    page = browser.new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on(
        "console", lambda message: page.wrong.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("request", lambda request: None if request.url.startswith(own) else page.wrong.append(request.url))
    return page


def wait_for(tab: Any, expression: str, arg: Any = None, seconds: float = 20.0) -> None:
    """Wait until a JavaScript expression holds. Playwright's own ``wait_for_function`` asks again by ``eval``, which
    our pages forbid."""
    deadline = time.monotonic() + seconds
    while not tab.evaluate(expression, arg):
        assert time.monotonic() < deadline, f"not true after {seconds:g} s: {expression}"
        tab.wait_for_timeout(20)
