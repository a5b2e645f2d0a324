"""The steering page in a real browser, on a real port.

Needs ``pip install playwright`` and a chromium on the path; AXE_CORE may name axe-core's ``axe.min.js`` (``npm pack
axe-core``).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from browser_tools import chromium, needs_chromium, watched
from explorer_data import HOSTILE

pytest.importorskip("torch")

from pipeline.steering.request import SteeringRequest
from rollout_workers.tasks.countdown import Countdown

pytest_plugins = ("rl_fixtures", "explorer_fixtures", "steering_fixtures")
pytestmark = needs_chromium
PROMPTS = Countdown().prompts("heldout")


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def tab(browser, page_address):
    """A tab that collects what goes wrong on it, and every request to another place than the service's own."""
    page = watched(browser, "http://127.0.0.1:", "about:", "data:")
    page.set_default_timeout(60_000)
    yield page
    page.close()
    assert not page.wrong


def visit(tab, address: str) -> None:
    """Open the page and wait until all three answers stand there."""
    tab.goto(f"{address}/")
    settled(tab)


def settled(tab) -> None:
    """Wait until nothing is asked any more."""
    tab.wait_for_selector("#steered:not(.busy) .token")
    tab.wait_for_selector("#beside:not(.busy) .panel:nth-child(3) .token")


def codes(tab, card: int | None = None) -> list[int]:
    """The codes under the tokens of the steered answer, or of a card beside."""
    where = "#steered .token small:first-of-type" if card is None else f"#beside .panel:nth-child({card}) .token small"
    return [int("".join(c for c in text if c.isdigit())) for text in tab.locator(where).all_text_contents()]


def open_token(tab, place: int) -> None:
    tab.click(f'#steered [data-place="{place}"]')
    tab.wait_for_selector(f"#open-head:has-text('Token {place}:')")


def press(tab, name: str) -> None:
    """A button of the opened token, by what a screen reader says."""
    tab.get_by_role("button", name=name, exact=True).click()
    settled(tab)


def test_click_use_forbid_and_take_back(tab, page_address, steerer):
    visit(tab, page_address)
    free = steerer.answer(SteeringRequest(prompt=PROMPTS[0].text))
    own = [token.code for token in free.tokens]
    assert codes(tab) == codes(tab, 1) == codes(tab, 2) == own
    assert tab.locator("#beside .panel:nth-child(3) .token").count() == len(
        steerer.base(SteeringRequest(prompt=PROMPTS[0].text)).tokens
    )
    assert f"reward {free.verdict.reward:.2f}" in tab.inner_text("#steered")
    # What a code would write is what it writes.
    open_token(tab, 1)
    found = steerer.candidates(SteeringRequest(prompt=PROMPTS[0].text), 1)
    other = next(row for row in found.codes if row.token != free.tokens[1].id)
    press(tab, f"Use code {other.code} at token 1")
    wanted = steerer.answer(SteeringRequest(prompt=PROMPTS[0].text, codes=[own[0], other.code]))
    assert codes(tab) == [token.code for token in wanted.tokens]
    assert tab.locator('#steered [data-place="1"].pinned.changed').count() == 1
    assert tab.input_value("#forced") == f"_,{other.code}"
    assert codes(tab, 2) == own  # what the policy does alone stays beside it
    # Forbidden at one token: the next best is taken there.
    tab.wait_for_selector("#open-head:has-text('Token 1:')")
    press(tab, f"Ban here forbid code {other.code} at token 1")
    barred = steerer.answer(SteeringRequest(prompt=PROMPTS[0].text, codes=own[:1], forbidden_at={1: [other.code]}))
    assert codes(tab) == [token.code for token in barred.tokens]
    assert "token 1: not code" in tab.inner_text(".chips")
    # And in the whole answer.
    tab.wait_for_selector("#open-head:has-text('Token 1:')")
    press(tab, f"Ban everywhere forbid code {own[0]} in the whole answer")
    assert own[0] not in codes(tab) and tab.input_value("#forbidden") == str(own[0])
    tab.get_by_role("button", name=f"allow code {other.code} at token 1 again").click()
    settled(tab)
    assert tab.locator(".chips").count() == 0
    press(tab, "Reset")
    assert codes(tab) == own


def test_rules_prompts_and_sampling_from_the_form(tab, page_address, steerer):
    visit(tab, page_address)
    tab.select_option("#pick", "2")
    settled(tab)
    assert tab.input_value("#prompt") == PROMPTS[2].text
    tab.fill("#allowed", "1,4-6")
    tab.fill("#forced", "_,5")
    tab.select_option("#mode", "sampled")
    tab.fill("#temperature", "2")
    tab.fill("#seed", "7")
    tab.fill("#max", "4")
    press(tab, "Generate")
    wanted = steerer.answer(
        SteeringRequest(
            prompt=PROMPTS[2].text, codes=[None, 5], allowed_codes=[1, 4, 5, 6], temperature=2.0, seed=7, max_tokens=4
        )
    )
    assert codes(tab) == [token.code for token in wanted.tokens]
    tab.fill("#prompt", PROMPTS[2].text + " 3")
    assert tab.input_value("#pick") == ""
    tab.keyboard.press("Control+Enter")
    tab.wait_for_selector("#steered:has-text('not scored')")
    # What cannot be is said, and what was there stays.
    before = codes(tab)
    for field, value, said in (
        ("#forced", "99", "0 to 7"),
        ("#forced", "a", "is not a code"),
        ("#max", "", "not a whole number"),
    ):
        tab.fill(field, value)
        tab.click("text=Generate")
        tab.wait_for_selector(f"#problem:visible:has-text('{said}')")
        tab.fill(field, {"#forced": "_,5", "#max": "4"}[field])
        assert codes(tab) == before
    # The browser itself reports a refusal's status on its console.
    tab.wrong = [words for words in tab.wrong if "400 (Bad Request)" not in words]


def test_the_keyboard_alone_steers_and_keeps_its_place(tab, page_address):
    visit(tab, page_address)
    tab.focus('#steered [data-place="0"]')
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#open-head:has-text('Token 1:')")
    assert tab.evaluate("document.activeElement.dataset.place") == "1"
    for _ in range(60):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.textContent").startswith("Use code"):
            break
    chosen = tab.evaluate("document.activeElement.textContent").split()[2]
    tab.keyboard.press("Enter")
    tab.wait_for_selector(f".chip:has-text('token 1: code {chosen}')")
    settled(tab)
    tab.wait_for_selector("#open-head:has-text('Token 1:')")
    assert tab.evaluate("document.activeElement.dataset.place") == "1"  # the focus is where the work goes on
    assert tab.text_content("#status").startswith("Answer: ")


def test_hostile_texts_stay_texts(tab, serving, hostile_steerer):
    visit(tab, serving(hostile_steerer))
    open_token(tab, 0)
    tab.wait_for_selector("#candidates tbody tr")
    text = tab.inner_text("body")
    assert text.count("window.pwned") > 20 and "\u202e" not in text.replace(tab.input_value("#prompt"), "")
    assert tab.evaluate("window.pwned") is None
    assert tab.locator("main img, main script, header img, header script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_axe_finds_nothing_serious(tab, page_address, scheme):
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.emulate_media(color_scheme=scheme)
    visit(tab, page_address)
    open_token(tab, 1)
    tab.get_by_role("button", name="Ban here forbid", exact=False).first.click()
    settled(tab)
    tab.wait_for_selector("#candidates tbody tr")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    buttons = tab.locator("#candidates td:last-child button")
    assert all(
        box["x"] >= 0 and box["x"] + box["width"] <= 390
        for box in (buttons.nth(i).bounding_box() for i in range(buttons.count()))
    )
    if "AXE_CORE" not in os.environ:
        pytest.skip("AXE_CORE does not name axe-core's axe.min.js (npm pack axe-core)")
    # by the debugger, which the page's policy does not bind
    tab.evaluate(Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8"))
    for width in (390, 1280):
        tab.set_viewport_size({"width": width, "height": 844})
        found = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        bad = [
            (v["id"], v["impact"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")
        ]
        assert not bad, bad
    assert HOSTILE not in tab.content()
