"""The report's page in a real browser: it is quiet, loads nothing, fits phones, can be read by keyboard and by ear, and
prints.

Needs ``pip install playwright`` and a chromium on the path; AXE_CORE may name axe-core's ``axe.min.js`` (``npm pack
axe-core``).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from browser_tools import chromium, needs_chromium, watched
from report_fixtures import HOSTILE, make_run

from pipeline.pages.page import chart
from pipeline.pages.page import page as simple_page
from pipeline.pages.report.build import build
from pipeline.pages.report.page import page

pytestmark = needs_chromium
SECTIONS = ("result", "gates", "curves", "codebook", "examples", "cost", "environment", "reproduce", "links")


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "report.html").write_text(page(build(make_run(folder / "run"))))
    pictures = [chart(f"reward {HOSTILE}", "update", {"a": [(1, 0.1), (2, 0.3)], "b": [(1, 0.2), (2, 0.1)]})]
    table = {"title": "Cost", "head": ["cost", "A"], "rows": [[HOSTILE, "1"]]}
    (folder / "other.html").write_text(simple_page(HOSTILE, lines=[HOSTILE], tables=[table], charts=pictures))
    return {name: (folder / f"{name}.html").as_uri() for name in ("report", "other")}


@pytest.fixture(scope="module")
def tab():
    """A page that collects what goes wrong on it."""
    with chromium() as browser:
        yield watched(browser, "file:", "about:")


@pytest.mark.parametrize("name", ["report", "other"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_quiet_and_fits(tab, addresses, name, width):
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto(addresses[name])
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("window.pwned") is None and tab.locator("main img, script").count() == 0
    assert tab.wrong == []
    if name == "report":
        assert [s.get_attribute("id") for s in tab.locator("main h2").all()] == list(SECTIONS)
        seen = tab.locator("#examples ~ article .text").first.inner_text()
        assert "<img src=x onerror=" in seen and "\u202e" not in seen
        letters = tab.evaluate(
            "parseFloat(getComputedStyle(document.querySelector('.chart text')).fontSize) * "
            "document.querySelector('.chart').getBoundingClientRect().width / 460"
        )
        assert letters > 8.5, "letters of pictures can be read on a phone"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(tab, addresses, scheme):
    if "AXE_CORE" not in os.environ:
        pytest.skip("AXE_CORE does not name axe-core's axe.min.js (npm pack axe-core)")
    script = Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8")
    tab.emulate_media(color_scheme=scheme, media="screen")
    tab.set_viewport_size({"width": 1280, "height": 900})
    for url in addresses.values():
        tab.goto(url)
        tab.evaluate(script)  # by the debugger, which the page's policy does not bind
        tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        found = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        assert not [
            (v["id"], v["impact"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")
        ]


def test_the_keyboard_gets_everywhere(tab, addresses):
    tab.goto(addresses["report"])
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    for name in SECTIONS:
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.getAttribute('href')") == f"#{name}"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "links" and tab.url.endswith("#links")
    tab.goto("about:blank")
    tab.goto(f"{addresses['report']}#curves")
    for _ in range(3):  # the first picture's table
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.parentElement.open")


def test_pictures_are_read_out_with_their_numbers(tab, addresses):
    tab.goto(addresses["report"])
    names = [
        tab.evaluate(
            "e => e.querySelector('title').textContent + ': ' + e.querySelector('desc').textContent", e.element_handle()
        )
        for e in tab.get_by_role("img").all()
    ]
    assert len(names) >= 8 and any(
        n.startswith("Success on held-out prompts: base: sampled 0.500 (0.100 to 0.500)") for n in names
    )


def test_it_prints_in_dark_mode_too_without_its_links(tab, addresses):
    tab.emulate_media(media="print", color_scheme="dark")
    tab.goto(addresses["report"])
    assert not tab.locator("nav").is_visible()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.pdf()[:5] == b"%PDF-"
    tab.emulate_media(media="screen", color_scheme="light")
