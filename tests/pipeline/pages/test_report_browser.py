"""The report's page in a real browser: it is quiet, loads nothing, fits phones, can be read by keyboard and by ear, and
prints.

Needs ``pip install playwright`` and a chromium on the path; AXE_CORE may name axe-core's ``axe.min.js`` (``npm pack
axe-core``).
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from browser_tools import chromium, needs_chromium, watched
from report_fixtures import HOSTILE, make_run

from pipeline.pages.page import report_page
from pipeline.pages.records import Curve, Example, Figure, Gallery, ReportPage, ReportSection, Table
from pipeline.pages.report.build import build

pytestmark = needs_chromium
SECTIONS = ("result", "gates", "curves", "codebook", "examples", "cost", "environment", "reproduce", "links")


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "report.html").write_text(report_page(build(make_run(folder / "run"))))
    whisker = {"value": 0.1, "low": -0.2, "high": 0.3, "from": -0.5, "to": 0.5}
    section = ReportSection(
        name="all",
        title=HOSTILE,
        lines=[HOSTILE],
        warnings=[HOSTILE],
        figures=[
            Figure(
                name="a",
                title=f"reward {HOSTILE}",
                across="update",
                curves=[Curve(name="a", x=(1, 2, 3), y=(0.1, 0.3, 0.2)), Curve(name=HOSTILE, x=(1, 3), y=(0.2, 0.1))],
            )
        ],
        tables=[
            Table(
                title="Cost",
                head=["cost", "A", "B", "C"],
                rows=[
                    [HOSTILE, "10", whisker, {"text": "3 * 4", "beside": "3 + 4"}],
                    ["z", "9", whisker, {"text": "1", "beside": "1"}],
                ],
            )
        ],
        galleries=[
            Gallery(
                title=HOSTILE,
                total=2,
                examples=[Example(prompt_id="a", prompt=HOSTILE, answers=[("b", HOSTILE, True)])],
            )
        ],
    )
    (folder / "other.html").write_text(report_page(ReportPage(title=HOSTILE, sections=[section])))
    return {name: (folder / f"{name}.html").as_uri() for name in ("report", "other")}


@pytest.fixture(scope="module")
def tab():
    """A page that collects what goes wrong on it."""
    with chromium() as browser:
        page = watched(browser, "file:", "about:", "blob:")
        page.set_default_timeout(120_000)
        yield page


@pytest.mark.parametrize("name", ["report", "other"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_quiet_and_fits(tab, addresses, name, width):
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto(addresses[name])
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("window.pwned") is None and tab.locator("main img, main script").count() == 0
    assert not set("\u202e\x00") & set(tab.evaluate("document.body.innerText + document.title"))
    assert tab.wrong == []
    if name == "report":
        assert [s.get_attribute("id") for s in tab.locator("main h2").all()] == list(SECTIONS)
        seen = tab.locator("#examples ~ article .text").first.inner_text()
        assert "<img src=x onerror=" in seen and "\u202e" not in seen


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
    for _ in range(5):  # past the links and the first picture's readout
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.parentElement.open")


def test_pictures_are_read_with_their_numbers_by_keyboard_and_as_a_table(tab, addresses):
    tab.goto(addresses["report"])
    figure = tab.locator("figure", has_text="Success on held-out prompts").first
    figure.locator(".reader").focus()
    tab.keyboard.press("Home")
    assert figure.locator("output").inner_text().strip() == "base: sampled 0.5 (0.1 to 0.5)"
    tab.keyboard.press("ArrowRight")
    assert figure.locator("output").inner_text().strip() == "base: greedy 0.5 (0.2 to 0.6)"
    figure.locator("summary").click()
    figure.locator("table").wait_for()
    assert "0.5 (0.1 to 0.5)" in figure.locator("tbody tr").first.inner_text()
    assert "The vertical axis begins at" in figure.inner_text()
    assert tab.locator("figure").count() >= 8


def test_a_picture_is_saved_as_svg_and_csv(tab, addresses, tmp_path):
    tab.goto(addresses["other"])
    tab.locator("figure summary").click()
    saved = {}
    for name in ("SVG", "CSV"):
        with tab.expect_download() as waiting:
            tab.get_by_role("button", name=name, exact=True).click()
        waiting.value.save_as(tmp_path / name)
        saved[name] = (tmp_path / name).read_text(encoding="utf-8")
    root = ET.fromstring(saved["SVG"])
    lines = [one.get("points").split() for one in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in lines] == [3, 2]
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights[0] > heights[2] > heights[1], "0.1, 0.3, 0.2: higher values lie higher"
    assert saved["CSV"].splitlines()[1:] == ['"1",0.1,0.2', '"2",0.3,""', '"3",0.2,0.1']


def test_tables_sort_and_mark_what_differs(tab, addresses):
    tab.goto(addresses["other"])
    assert [one.inner_text() for one in tab.locator(".apart").all()] == ["*"]
    assert tab.locator(".whisker").count() == 2
    tab.get_by_role("button", name="A", exact=True).click()
    assert tab.locator("tbody td:nth-child(2)").all_inner_texts() == ["10", "9"]
    tab.keyboard.press("Enter")
    assert tab.locator("tbody td:nth-child(2)").all_inner_texts() == ["9", "10"]


def test_it_prints_in_dark_mode_too_without_its_links(tab, addresses):
    tab.emulate_media(media="print", color_scheme="dark")
    tab.goto(addresses["report"])
    assert tab.locator("nav:visible").count() == 0
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.pdf()[:5] == b"%PDF-"
    tab.emulate_media(media="screen", color_scheme="light")
