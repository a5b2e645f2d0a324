"""The explorer's page in a real browser.

Needs ``pip install playwright`` and a chromium on the path; AXE_CORE may name axe-core's ``axe.min.js`` (``npm pack axe-core``).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from explorer_fixtures import HOSTILE

from pipeline.explorer.page import write_page

pytest_plugins = ["explorer_fixtures"]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")
VIEWS = ("gain", "codes&code=3", "rollouts&rollout=12", "rollouts&rollout=30", "training", "where", "policy", "compare")
INTERACTIVE_MS, SETTLED_MS = 1000, 200


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory, large_dataset) -> str:
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    return write_page([large_dataset(), large_dataset(codes=8, rollouts=40, run="other")], path).as_uri()


@pytest.fixture
def tab(browser):
    """A page that collects what goes wrong on it, and asks for nothing over the network."""
    page = browser.new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda request: None if request.url.startswith(("file:", "about:")) else page.wrong.append(request.url))
    yield page
    page.close()
    assert not page.wrong


def visit(tab, url: str) -> None:
    """Load ``url`` anew: going to another fragment alone loads nothing, and shows it only later."""
    tab.goto("about:blank")
    tab.goto(url)


def text_of(tab, selector: str = "main") -> str:
    return tab.inner_text(selector)


def test_it_is_interactive_within_a_second_at_2000_rollouts(tab, address):
    tab.goto(address, wait_until="load")
    # Every part of this is work of the page itself: from navigation to load (which runs the script), then a view with all rollouts.
    loaded = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    shown = tab.evaluate(
        """() => {
            const start = performance.now();
            location.hash = "#view=rollouts";
            window.dispatchEvent(new Event("hashchange"));
            document.body.getBoundingClientRect();
            return performance.now() - start;
        }"""
    )
    assert loaded < INTERACTIVE_MS and shown < INTERACTIVE_MS
    assert tab.locator("ol.rollouts li").count() == 25


def test_every_view_shows_something_and_hostile_texts_stay_texts(tab, address):
    visit(tab, address)
    for view in VIEWS:
        visit(tab, f"{address}#view={view}")
        assert tab.locator("main h2").count() == 1, view
        assert len(text_of(tab)) > 200, view
        assert tab.locator("main img, main script").count() == 0
    assert tab.evaluate("window.pwned") is None
    visit(tab, f"{address}#view=gain")
    assert HOSTILE[:60] in text_of(tab)  # the note, letter by letter


def test_deep_links_choose_code_and_rollout(tab, address):
    visit(tab, f"{address}#code=3&rollout=12")
    assert text_of(tab, "h2") == "Rollout 12"
    assert tab.eval_on_selector("select", "s => s.value") == "3"
    visit(tab, f"{address}#code=3")
    assert text_of(tab, "h2") == "Code 3"
    visit(tab, f"{address}#run=1&view=codes&code=5")
    assert "other" in text_of(tab, "h1")
    visit(tab, f"{address}#code=99999&view=nonsense")
    assert "gain" in text_of(tab, "h2")


def test_clicking_a_token_filters_and_sorting_sorts(tab, address):
    visit(tab, f"{address}#view=rollouts")
    token = tab.locator("ol.rollouts li .token").first
    code = token.locator("small").inner_text()
    token.click()
    tab.wait_for_timeout(SETTLED_MS)
    assert f"code={code}" in tab.url
    shown = tab.locator("ol.rollouts li")
    assert all(code in shown.nth(i).locator("small").all_inner_texts() for i in range(shown.count()))
    tab.select_option("[data-key='select sorted by']", "worst")
    tab.wait_for_timeout(SETTLED_MS)
    rewards = [float(text.split()[-1]) for text in tab.locator("ol.rollouts .good, ol.rollouts .bad").all_inner_texts()]
    assert rewards == sorted(rewards)


def test_the_keyboard_alone_reaches_a_choice_and_its_endings(tab, address):
    visit(tab, f"{address}#view=rollouts&outcome=explained")
    for _ in range(60):
        tab.keyboard.press("Tab")
        if "rollout=" in (tab.evaluate("document.activeElement.getAttribute('href')") or "") and tab.evaluate(
            "document.activeElement.textContent.startsWith('rollout')"
        ):
            break
    tab.keyboard.press("Enter")
    tab.wait_for_selector("button.token")
    assert tab.evaluate("document.activeElement.tagName") == "H2"
    for _ in range(60):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.dataset.key") == "step 4":
            break
    tab.keyboard.press("Enter")
    tab.wait_for_timeout(SETTLED_MS)
    assert "at token 4" in text_of(tab, "section.panel")
    assert "How it ends with each choice" in text_of(tab, "section.panel")
    assert tab.evaluate("document.activeElement.dataset.key") == "step 4"  # focus stays


def test_a_table_sorts_by_its_heads_and_says_so(tab, address):
    visit(tab, f"{address}#view=codes")
    tab.get_by_role("button", name="chosen", exact=True).click()
    assert tab.locator("th[aria-sort=descending]").inner_text().startswith("chosen")
    first = tab.locator("tbody tr").first.locator("td").nth(3).inner_text()
    assert first == "163"  # 100 + the largest code


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(tab, address, scheme):
    if "AXE_CORE" not in os.environ:
        pytest.skip("AXE_CORE does not name axe-core's axe.min.js (npm pack axe-core)")
    script = Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8")
    tab.emulate_media(color_scheme=scheme)
    visit(tab, address)
    tab.evaluate(script)  # by the debugger, which the page's policy does not bind
    for view in VIEWS:
        tab.evaluate("hash => { location.hash = hash; window.dispatchEvent(new Event('hashchange')); }", f"#view={view}")
        found = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        bad = [(v["id"], v["impact"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]
        assert not bad, (view, bad)


def test_a_phone_shows_it_without_sideways_scrolling(tab, address):
    tab.set_viewport_size({"width": 390, "height": 844})
    visit(tab, address)
    for view in VIEWS:
        visit(tab, f"{address}#view={view}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390, view
