"""The page of ``watch`` in a real browser, while a run grows.

Needs ``pip install playwright`` and a chromium on the path; AXE_CORE may name axe-core's ``axe.min.js`` (``npm pack
axe-core``).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from browser_tools import chromium, needs_chromium, wait_for, watched

from configs.schema import Explorer
from pipeline.pages.explorer.build import explore
from pipeline.pages.explorer.page import write_page

pytest_plugins = ("watch_fixtures", "rl_fixtures", "explorer_fixtures", "watch_model_fixtures")
pytestmark = needs_chromium
MODEL_MS = 240_000
"""A process starts and loads a model, beside other tests."""


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def tab(browser):
    """A tab that collects what goes wrong on it, and every request to another place than the service's own."""
    page = watched(browser, "http://127.0.0.1:", "about:", "data:")
    page.set_default_timeout(60_000)
    yield page
    # A pattern that is wrong; the icon that the browser asks for beside a sandboxed page, which is of no origin.
    wrong = [one for one in page.wrong if "status of 400" not in one and "BLOCKED_BY_RESPONSE.NotSameOrigin" not in one]
    assert not page.evaluate("window.pwned") and not wrong
    page.close()


def test_curves_and_rollouts_come_while_the_run_works(tab, run_at_work, watching):
    tab.goto(f"{watching(run_at_work.folder)}/")
    tab.wait_for_selector("text=Nothing has been logged yet.")
    run_at_work.update()
    run_at_work.update()
    began = time.monotonic()
    tab.wait_for_selector(".uplot")
    assert time.monotonic() - began < 5
    assert "improve 2 of 50, reward of the last update 0.020" in tab.inner_text("#about")
    tab.click("nav a:has-text('Rollouts')")
    tab.wait_for_selector("#rollouts li:nth-child(8) .token")
    assert "8 rollouts, 1 to 8 shown" in tab.inner_text("#found")
    tokens = tab.locator("#rollouts li:first-child .token")
    assert [text.split()[-1] for text in tokens.all_text_contents()] == ["0", "5", "3"]  # its codes
    run_at_work.update("stop here")
    tab.wait_for_selector("#found:has-text('12 rollouts')")
    tab.fill("#s-text", r"st.p\s")
    tab.check("#s-regex")
    tab.wait_for_selector("#found:has-text('4 rollouts')")
    assert "regex=1" in tab.url  # a view can be linked to
    tab.fill("#s-text", "(")
    tab.wait_for_selector("#problem:has-text('not a regular expression')")
    assert tab.inner_text("#found") == "" and not tab.locator("#rollouts li").count()  # no older answer below it
    tab.click("button:has-text('Reset')")
    tab.wait_for_selector("#found:has-text('12 rollouts')")
    assert tab.is_hidden("#problem")
    run_at_work.log.close()


def test_a_group_by_keyboard_and_time(tab, run_at_work, watching):
    for _ in range(3):
        run_at_work.update()
    tab.goto(f"{watching(run_at_work.folder)}/#tab=rollouts")
    tab.wait_for_selector("#rollouts li:nth-child(12)")
    tab.focus("#rollouts li:first-child a")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#group .panel:nth-child(4)")
    first, last = (tab.inner_text(f"#group .panel:nth-child({place})") for place in (1, 4))
    assert "advantage +0.750" in first and "success, reward 1.00" in first
    assert "advantage \u22120.250" in last and "verifier failed: Timeout" in tab.inner_text("#group")
    tab.click("nav a:has-text('Cost')")
    tab.wait_for_selector(".uplot")
    assert "update 3: sampling 0.75, verifying 0.25, updating 0.5" in tab.inner_text("figure output")
    assert "50% of the time" in tab.inner_text("#view")
    tab.wait_for_selector(".sections table:has-text('improve')")
    tab.click("nav a:has-text('Curves')")
    tab.wait_for_selector(".uplot")
    tab.focus(".reader")
    tab.keyboard.press("Home")
    assert tab.inner_text("figure output").startswith("update 1: improve")
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("figure output").startswith("update 2: improve")
    run_at_work.update()  # the curves are drawn again: the focus stays
    wait_for(tab, "document.querySelector('figure output').textContent.startsWith('update 4')")
    assert tab.evaluate("document.activeElement.className") == "reader"


def test_links_to_pages_and_another_run(tab, run_at_work, watching):
    run_at_work.update()
    (run_at_work.folder / "report.html").write_text("<title>the report</title>")
    other = run_at_work.folder.with_name("second")
    other.mkdir()
    (other / "config.yaml").write_bytes((run_at_work.folder / "config.yaml").read_bytes())
    tab.goto(f"{watching(other.parent)}/#run=first")
    tab.click("#links a:has-text('report.html')")
    wait_for(tab, "document.title === 'the report'")
    tab.go_back()
    tab.wait_for_selector("#title:has-text('first')")
    tab.select_option("#pick", "second")
    tab.wait_for_selector("#title:has-text('second')")
    assert tab.locator("#links a").count() == 0
    tab.click("nav a:has-text('Compare')")
    tab.wait_for_selector("label:has-text('first') input")
    assert tab.is_checked("label:has-text('second') input") and not tab.is_checked("label:has-text('first') input")


def test_of_a_run_that_cannot_be_read_it_says_why_and_nothing_of_the_one_before(tab, run_at_work, watching):
    run_at_work.update()
    (run_at_work.folder / "report.html").write_text("the report")
    other = run_at_work.folder.with_name("half")
    other.mkdir()
    (other / "config.yaml").write_text("base: [")
    tab.goto(f"{watching(other.parent)}/#run=first")
    tab.wait_for_selector("#links a")
    tab.select_option("#pick", "half")
    tab.wait_for_selector("#connection:has-text('not valid YAML')")
    assert tab.inner_text("#title") == "half" and not tab.inner_text("#about")
    assert tab.locator("#links a").count() == 0
    (other / "config.yaml").write_bytes((run_at_work.folder / "config.yaml").read_bytes())
    tab.wait_for_selector("text=Nothing has been logged yet.")
    assert not tab.inner_text("#connection")


def test_why_any_rollout_and_any_heldout_answer(tab, run, watching):
    tab.set_default_timeout(MODEL_MS)
    tab.goto(f"{watching(run.folder)}/#tab=rollouts")
    tab.click("#rollouts li:nth-child(3) a:has-text('why')")
    tab.wait_for_selector("#why table:has-text('P(code) under the policy')")
    own = tab.inner_text("#rollouts li:nth-child(3) .tokens").split()
    assert tab.inner_text("#why .tokens").split() == own
    assert "advantage (reward" in tab.inner_text("#why")
    tab.click("#why button.token:nth-child(2)")
    tab.wait_for_selector("#why button.token:nth-child(2)[aria-pressed=true]")
    assert "step=1" in tab.url and "why=" in tab.url
    tab.select_option("#s-variant", "improved")
    tab.wait_for_selector("#found:has-text('2 rollouts')")
    tab.click("#rollouts li:nth-child(1) a:has-text('why')")
    tab.wait_for_selector("#why h3:has-text('improved/greedy')")
    assert "advantage" not in tab.inner_text("#why dl") and "otherwise" not in tab.inner_text("#why")
    tab.click("#rollouts li:nth-child(2) a:has-text('why')")
    tab.wait_for_selector("#why .note:has-text('differs from the evaluation')")
    tab.select_option("#s-variant", "base")
    tab.wait_for_selector("#found:has-text('1 rollouts')")
    assert tab.locator("#rollouts a:has-text('why')").count() == 0  # it has no codes
    tab.click("#rollouts a:has-text('group')")
    tab.wait_for_selector("#group .panel:nth-child(3)")
    tab.click("#view p a:has-text('that failed')")
    fields = "['success', 'variant'].map((name) => document.getElementById(`s-${name}`).value).join()"
    wait_for(tab, f"{fields} === 'bad,improved'")  # the fields say what the link asked for
    tab.go_back()
    wait_for(tab, f"{fields} === ',base'")


def test_codes_in_words_on_the_live_explorer(tab, run, watching):
    tab.set_default_timeout(MODEL_MS)
    write_page([explore(run.folder, Explorer(seconds=60.0, explained=1))[0]], run.folder / "explorer.html")
    address = watching(run.folder)
    tab.goto(address + "/")
    tab.click("#tabs a:has-text('Codes')")
    tab.click("#views a:has-text('Rollouts')")
    tab.select_option("select[data-key='select show']", "bad")
    tab.click("ol.rollouts li:last-child a:has-text('rollout')")
    if tab.locator("button:has-text('Compute counterfactuals')").count():
        tab.click("button:has-text('Compute counterfactuals')")
    tab.wait_for_selector("section.panel table:has-text('P(code) under the policy')")
    tab.goto(f"{address}/runs/run/codes/#view=codes&code=2")
    tab.wait_for_selector("h2:has-text('Code 2')")
    tab.fill("#typed", "3 5 7 -> 15 :")
    tab.click("section[aria-labelledby=fires] button:has-text('Show')")
    tab.wait_for_selector("section[aria-labelledby=fires] [role=status] small")
    tab.click("button:has-text('Ban it')")
    tab.wait_for_selector("section[aria-labelledby=ablation] :text('Banned code 2: success')")
    tab.fill("#note", "writes \u202e<b>nothing</b>")
    tab.click("button:has-text('Keep')")
    tab.wait_for_selector("section.panel :text('Kept.')")
    tab.reload()
    wait_for(tab, "document.getElementById('note').value.includes('nothing')")
    assert "code 2" in (run.folder / "notes.json").read_text()
    tab.click("#views a:has-text('Watch')")
    tab.wait_for_selector("#tabs")
    tab.click("#tabs a:has-text('Steer')")
    tab.wait_for_selector("#steered:not(.busy) .token")
    tab.click("header a:has-text('Watch')")
    tab.wait_for_selector("#tabs a:has-text('Steer')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_phone_and_screen_and_axe_finds_nothing_serious(tab, run_at_work, watching, scheme):
    if "AXE_CORE" not in os.environ:
        pytest.skip("AXE_CORE does not name axe-core's axe.min.js (npm pack axe-core)")
    axe = Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8")
    for _ in range(3):
        run_at_work.update()
    tab.emulate_media(color_scheme=scheme)
    address = watching(run_at_work.folder)
    waits = {
        "curves": ".uplot",
        "rollouts&group=g1": "#group .panel",
        "cost": ".sections table",
        "rewards": ".sections figure",
        "result": ".sections p",
        "compare": "#view p",
    }
    for width in (390, 1440):
        tab.set_viewport_size({"width": width, "height": 844})
        for view, selector in waits.items():
            tab.goto("about:blank")
            tab.goto(f"{address}/#tab={view}")
            tab.wait_for_selector(selector)
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), (view, width)
            tab.evaluate(axe)
            found = tab.evaluate("axe.run()")["violations"]
            assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
