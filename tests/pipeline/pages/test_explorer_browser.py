"""The explorer's page in a real browser: one session, one page of two runs (B is an agent's), gone through by mouse and
by keyboard.

Needs ``pip install playwright`` and a chromium on the path; AXE_CORE may name axe-core's ``axe.min.js`` (``npm pack
axe-core``). How fast the page is at 2,000 rollouts, and axe-core on that one, is measured by
``benchmarks/explorer.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from browser_tools import chromium, needs_chromium, wait_for, watched
from explorer_data import DECISIVE, HOSTILE, made_up

from pipeline.pages.explorer.page import write_page

pytestmark = needs_chromium
VIEWS = ("gain", "codes&code=3", "rollouts&rollout=1", "rollouts&rollout=30", "training", "where", "policy", "compare")
OF_AN_AGENT = ("gain&run=1", "codes&code=3&run=1", "rollouts&rollout=1&run=1", "policy&run=1")
FIRST_VIEW_NODES = 2500
"""Most elements of the first view at 64 codes and 2,000 rollouts: that is what its time is spent on."""


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def session(browser, tmp_path_factory):
    """A page that collects what goes wrong on it, and asks for nothing over the network."""
    datasets = [made_up(8, 60, 12, explained=4), made_up(8, 40, 12, run="agent \u202e</script>", explained=2, turns=2)]
    address = write_page(datasets, tmp_path_factory.mktemp("page") / "explorer.html").as_uri()
    page = watched(browser, "file:", "about:")
    page.address = address
    page.goto(address)
    yield page
    page.close()


@pytest.fixture
def tab(session):
    yield session
    assert not session.wrong


def visit(tab, fragment: str) -> None:
    """Go to another view as a link of the page does, and wait for it."""
    tab.evaluate("hash => { location.hash = hash; window.dispatchEvent(new Event('hashchange')); }", "#" + fragment)


def load(tab, fragment: str = "") -> None:
    """Open the address anew, as from a bookmark."""
    tab.goto("about:blank")
    tab.goto(f"{tab.address}#{fragment}" if fragment else tab.address)


def text_of(tab, selector: str = "main") -> str:
    return tab.inner_text(selector)


def focused(tab, what: str = "dataset.key") -> str:
    return tab.evaluate(f"String(document.activeElement.{what})")


def tab_until(tab, reached) -> None:
    for _ in range(60):
        tab.keyboard.press("Tab")
        if reached():
            return
    pytest.fail(f"60 presses of Tab did not reach it; the focus is on {focused(tab, 'outerHTML')[:200]}")


def test_every_view_shows_something_and_hostile_texts_stay_texts(tab):
    load(tab)
    for view in VIEWS + OF_AN_AGENT:
        visit(tab, f"view={view}")
        assert tab.locator("main h2").count() == 1, view
        assert len(text_of(tab)) > 200, view
        assert tab.locator("main img, main script").count() == 0
        assert not set("\u202e\x00\u200d\u2028") & set(tab.evaluate("document.body.innerText + document.title")), view
        assert "undefined" not in text_of(tab) and "NaN" not in text_of(tab), view
    assert tab.evaluate("window.pwned") is None
    visit(tab, "view=gain")
    assert HOSTILE[:60] in text_of(tab)  # the note, letter by letter
    assert tab.locator("header nav:visible").count() == 2


def test_deep_links_choose_code_and_rollout(tab):
    load(tab, "code=3&rollout=12")
    assert text_of(tab, "h2") == "Rollout 12"
    assert tab.eval_on_selector("select", "s => s.value") == "3"
    load(tab, "code=3")
    assert text_of(tab, "h2") == "Code 3"
    visit(tab, "run=1&view=codes&code=5")
    assert "agent" in text_of(tab, "h1")
    visit(tab, "code=99999&view=nonsense")
    assert "gain" in text_of(tab, "h2")


def test_the_gain_is_said_in_words(tab):
    visit(tab, "view=gain")
    said = text_of(tab, "main p >> nth=0")
    assert "changed by +0.400 (95 % interval +0.300 to +0.500)" in said
    assert "One code has a significant contribution (95 % CI above 0)" in said and "the largest: 7 +0.020" in said
    assert "Most of the gain comes at positions" in text_of(tab)


def test_clicking_a_token_filters_and_sorting_sorts(tab):
    visit(tab, "view=rollouts")
    token = tab.locator("ol.rollouts li .token").first
    code = token.locator("small").text_content().split()[-1]
    token.click()
    wait_for(tab, "code => location.hash.includes(`code=${code}`)", arg=code)
    wait_for(tab, "code => document.querySelector('select')?.value === code", arg=code)
    items = "[...document.querySelectorAll('ol.rollouts li')]"
    codes = tab.evaluate(f"{items}.map(li => [...li.querySelectorAll('small')].map(small => small.lastChild.data))")
    assert len(codes) > 1 and all(code in some for some in codes)
    tab.select_option("[data-key='select sorted by']", "worst")
    wait_for(tab, "location.hash.includes('sort=worst')")
    visit(tab, "view=rollouts&sort=worst")
    rewards = [
        float(text.split()[-1]) for text in tab.locator("ol.rollouts .good, ol.rollouts .bad").all_text_contents()
    ]
    assert len(rewards) == 25 and rewards == sorted(rewards)
    tab.get_by_role("link", name="Next").first.click()
    wait_for(tab, "document.querySelector('.pager')?.textContent.includes('page 2 of 3')")


def test_the_keyboard_alone_reaches_a_choice_and_its_endings(tab):
    visit(tab, "view=gain")
    visit(tab, "view=rollouts&outcome=explained")
    tab_until(tab, lambda: focused(tab, "textContent").startswith("rollout "))
    tab.keyboard.press("Enter")
    wait_for(tab, "document.querySelector('h2').textContent !== 'Rollouts'")
    assert focused(tab, "tagName") == "H2"
    tab_until(tab, lambda: focused(tab).startswith("step "))  # one stop for all tokens
    for _ in range(4 - DECISIVE):
        tab.keyboard.press("ArrowRight")
    assert focused(tab) == "step 4"
    tab.keyboard.press("Enter")
    wait_for(tab, "document.querySelector('section.panel')?.textContent.includes('at token 4')")
    assert "Counterfactual continuations (greedy, after RL)" in text_of(tab, "section.panel")
    assert focused(tab) == "step 4"  # focus stays
    tab.keyboard.press("End")
    assert focused(tab) == "step 11"
    tab.keyboard.press("Tab")
    assert not focused(tab).startswith("step ")


def test_a_table_sorts_by_its_heads_and_says_so(tab):
    visit(tab, "view=codes")
    tab.get_by_role("button", name="chosen", exact=True).click()
    assert tab.locator("th[aria-sort=descending]").inner_text().startswith("chosen")
    first = tab.locator("tbody tr").first.locator("td").nth(3).inner_text()
    assert first == "107"  # 100 + the largest code
    tab.keyboard.press("Enter")
    assert tab.locator("th[aria-sort=ascending]").inner_text().startswith("chosen")


def test_why_is_said_in_words_that_fit_the_data(tab):
    dataset = made_up(8, 60, 12, explained=4)
    step = dataset.why[1].steps[DECISIVE]
    other = dataset.vocabulary[step.endings[1].tokens[0]]
    visit(tab, "view=rollouts&rollout=1")  # the choice that decides is open
    panel = text_of(tab, "section.panel")
    assert f"Decisive tokens (counterfactual, greedy continuation after RL): token {DECISIVE}: " in panel
    assert f" rather than {other}, with which the reward would be 1.00 instead of 0.50." in panel
    assert focused_step(tab) == f"step {DECISIVE}"
    assert "The likeliest other token is" in panel
    tab.locator("section.panel .tokens button").nth(5).click()
    wait_for(tab, "location.hash.includes('step=5')")
    assert "at token 5" in text_of(tab, "section.panel h3")


def focused_step(tab) -> str:
    return tab.locator("section.panel button[aria-pressed=true]").get_attribute("data-key")


def test_what_the_world_said_is_set_apart_and_what_is_not_computed_is_said(tab):
    visit(tab, "view=rollouts&rollout=1&run=1")
    seen = tab.locator("section.panel .seen")
    assert seen.count() == 1 and seen.text_content().startswith("observation: ")
    assert tab.locator("section.panel .tokens button").count() == 6  # four before it, two behind
    assert "not computed for episodes of several turns" in text_of(tab, "section.panel")
    assert "0.25, 0.75" in text_of(tab, "section.panel .tiles")
    visit(tab, "view=gain&run=1")
    assert "was not computed for this run" in text_of(tab)


def test_a_heatmap_reads_as_a_table_that_leads_to_its_codes(tab):
    visit(tab, "view=where")
    tab.locator("summary").first.click()
    row = tab.locator("details tbody tr").nth(2)
    code = row.locator("th").inner_text()
    row.locator("a").click()
    wait_for(tab, "code => document.querySelector('h2')?.textContent === `Code ${code}`", arg=code)
    assert f"code={code}" in tab.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(tab, scheme):
    if "AXE_CORE" not in os.environ:
        pytest.skip("AXE_CORE does not name axe-core's axe.min.js (npm pack axe-core)")
    tab.emulate_media(color_scheme=scheme)
    load(tab)
    # by the debugger, which the page's policy does not bind
    tab.evaluate(Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8"))
    # all that differs
    options = {"resultTypes": ["violations"]} | ({} if scheme == "light" else {"runOnly": ["color-contrast"]})
    for view in VIEWS + OF_AN_AGENT:
        visit(tab, f"view={view}&outcome=explained")
        found = tab.evaluate("options => axe.run(document, options)", options)["violations"]
        bad = [
            (v["id"], v["impact"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")
        ]
        assert not bad, (view, bad)


def test_a_phone_shows_it_without_sideways_scrolling(tab):
    tab.set_viewport_size({"width": 390, "height": 844})
    for view in VIEWS + OF_AN_AGENT:
        visit(tab, f"view={view}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390, view


def test_a_large_run_starts_with_a_small_view(tab, tmp_path):
    """What its speed rests on; the seconds themselves depend on the machine."""
    tab.goto(write_page([made_up(rollouts=400, explained=1)], tmp_path / "large.html").as_uri())
    assert tab.evaluate("document.querySelectorAll('*').length") < FIRST_VIEW_NODES
    visit(tab, "view=rollouts")
    assert tab.locator("ol.rollouts li").count() == 25
    assert tab.locator("header nav:visible").count() == 1  # one run has nothing to choose
