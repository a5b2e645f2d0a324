"""Makes docs/images/recording.gif: a run on the terminal, its page in ``watch``, and a code steered by hand.

Run it where a quickstart run is finished and chromium and playwright are installed:
``python docs/recording.py RUN``. Everything shown is real: the run's own lines at its own pace (20 seconds stand for
all of it), the served pages with clicks on them.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Page, sync_playwright

from pipeline.cli.output import closing_words

OUT = Path(__file__).parent / "images" / "recording.gif"
SIZE, COLOURS = (760, 470), 24
LINE, MARGIN, LINES = 15, 12, 29
WAIT = 600_000
"""Milliseconds for what a page waits for: a busy machine loads a model slowly."""
Frames = list[tuple[Image.Image, int]]
"""Pictures with the milliseconds that each is shown for."""


def terminal(run: Path) -> Frames:
    """The lines of a run: its updates as they were logged, then its closing words."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rl = [r for r in records if r.get("stage") == "improve" and "reward" in r]
    head = ["$ latent-control run quickstart", f"watch it: latent-control watch {run.name}"]
    lines: list[str] = []
    frames: Frames = [(_screen(head), 900)]
    for stage in ("actions", "clone"):
        done = [r for r in records if r.get("stage") == stage and "loss" in r]
        if done:
            lines.append(f"{stage:9}{done[-1]['step']}/{done[-1]['step']}  loss {done[-1]['loss']:.3f}")
            frames.append((_screen([*head, *lines]), 500))
    for r in rl[:: max(1, len(rl) // 8)]:
        said = (
            f"improve  {r['step']:>3}/{len(rl)}  reward {r['reward']:.3f}  success {r.get('success', r['reward']):.3f}"
        )
        frames.append((_screen([*head, *lines, said]), 300))
    closing = [re.sub(r"\S*/(?=[\w.-]+$)", "", line)[:100] for line in closing_words(run).splitlines()]
    return [*frames, (_screen([*head, *lines, said, *closing[: LINES - len(lines) - 4]]), 2600)]


def _screen(lines: list[str]) -> Image.Image:
    shown = Image.new("RGB", SIZE, "#14171b")
    draw = ImageDraw.Draw(shown)
    font = next((path for path in map(Path, FONTS) if path.is_file()), None)
    letters = ImageFont.truetype(str(font), 12) if font else ImageFont.load_default()
    for place, line in enumerate(lines[:LINES]):
        draw.text((MARGIN, MARGIN + LINE * place), line, fill="#e8ebef" if place else "#7fd39b", font=letters)
    return shown


FONTS = (
    "/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf",
    "/usr/share/fonts/truetype/liberation/LiberationMono-Regular.ttf",
)


@contextmanager
def watched(run: Path) -> Iterator[str]:
    """The address of a page of ``watch`` on the run."""
    words = [sys.executable, "-m", "pipeline", "watch", str(run)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http" in line)
        try:
            yield next(word for word in line.split() if word.startswith("http"))
        finally:
            process.terminate()
            process.communicate()


def pages(address: str, name: str) -> Frames:
    """Curves, rollouts with a counterfactual, the collapse verdict, and a code chosen by hand."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light")
        tab.set_default_timeout(WAIT)
        tab.goto(address)
        tab.wait_for_selector(".uplot")
        frames = [_shot(tab, 2200)]
        tab.click("nav a:has-text('Rollouts')")
        tab.wait_for_selector("#rollouts .token")
        tab.evaluate("document.querySelector('#found').scrollIntoView()")
        frames.append(_shot(tab, 1600))
        tab.click("#rollouts li:first-child a:has-text('why')")
        tab.wait_for_selector("#why table")
        tab.evaluate("document.querySelector('#why').scrollIntoView()")
        frames.append(_shot(tab, 2600))
        tab.goto(f"{address}runs/{name}/codes/")
        tab.wait_for_selector("h2")
        frames.append(_shot(tab, 2200))
        tab.goto(f"{address}runs/{name}/steer/")
        tab.wait_for_selector("#beside:not(.busy) .panel:nth-child(3) .token")
        tab.evaluate("document.querySelector('#answer').scrollIntoView()")
        frames.append(_shot(tab, 1400))
        tab.click('#steered [data-place="1"]')
        tab.wait_for_selector("#candidates tbody tr")
        frames.append(_shot(tab, 1600))
        tab.locator(".codes button:has-text('Use')").nth(3).click()
        tab.wait_for_selector("#steered .pinned")
        tab.wait_for_selector("#steered:not(.busy) .token")
        frames.append(_shot(tab, 2600))
        browser.close()
    return frames


def _shot(tab: Page, milliseconds: int) -> tuple[Image.Image, int]:
    tab.wait_for_timeout(300)
    return Image.open(io.BytesIO(tab.screenshot())).convert("RGB"), milliseconds


def main(run: Path) -> None:
    """Write ``OUT``."""
    with watched(run) as address:
        frames = [*terminal(run), *pages(address, run.name)]
    pictures = [picture.quantize(COLOURS, dither=Image.Dither.NONE) for picture, _ in frames]
    times = [milliseconds for _, milliseconds in frames]
    pictures[0].save(OUT, save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True)
    print(f"{OUT}: {sum(times) / 1000:.1f} s, {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
