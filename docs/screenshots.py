"""The pictures of the documentation, taken of finished runs in a real browser: MLflow, explorer, report, and what else
has a page.

    python docs/screenshots.py RUN_A RUN_B                     all pictures into docs/images (both runs in one MLflow
    store) python docs/screenshots.py RUN_A RUN_B --only report       one of them

Needs ``pip install playwright`` and a chromium on the path. Servers are started on this machine, on ports that are
free, and ended. A page of yours: add a ``Shot`` to ``SHOTS``; what needs a server of its own starts it in ``address``,
by ``serving``.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHARTS = "^(reward|success|entropy)$"
"""MLflow takes a regular expression of metrics' names."""
WIDTH, COLOURS, MOST_BYTES, PATIENCE_MS = 1280, 128, 200_000, 90_000


@dataclass(frozen=True, kw_only=True)
class Places:
    """What there is to take pictures of."""

    run: Path
    other: Path
    stack: ExitStack
    """Ends what ``address`` started."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A picture: ``Shot(name="report", height=900, address=lambda places: (places.run / "report.html").as_uri())``."""

    name: str
    address: Callable[[Places], str]
    height: int = 800
    """Of the window; a page may go on below it."""
    prepare: Callable[[Any], None] = lambda page: None
    """Waits for what loads late, clicks what must be open."""


@contextmanager
def serving(*words: str) -> Iterator[Callable[[str], re.Match[str]]]:
    """``latent-control WORDS`` for the length of a block; what it gives waits for the first line of output that
    matches."""
    command = [sys.executable, "-m", "pipeline", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines: list[str] = []

    def found(pattern: str) -> re.Match[str]:
        while True:
            for line in lines:
                if match := re.search(pattern, line):
                    return match
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(
                    f"latent-control {' '.join(words)} ended without a line like {pattern!r}: {''.join(lines)[-500:]}"
                )
            lines.append(line)

    try:
        yield found
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mlflow_charts(places: Places) -> str:
    """The printed link that lays the improve stages of all runs over each other."""
    line = places.stack.enter_context(serving("ui", str(places.run), "--port", str(free_port())))
    return line(r"improve of all runs: (\S+)")[1]


def charts_are_drawn(page: Any) -> None:
    """MLflow's side panels closed, and of its charts those that tell most; it draws them one after the other."""
    page.wait_for_selector(".js-plotly-plot .scatterlayer .trace", timeout=PATIENCE_MS)
    for name in ("Close", "Toggle sidebar"):
        if (button := page.get_by_role("button", name=name, exact=True)).count():
            button.first.click()
    page.get_by_placeholder("Search metric charts").fill(CHARTS)
    page.wait_for_timeout(6000)


def explorer_is_drawn(page: Any) -> None:
    """Its script fills the page."""
    page.wait_for_selector("main h2", timeout=PATIENCE_MS)


def steering(places: Places) -> str:
    """The service's own address."""
    return places.stack.enter_context(serving("steer", str(places.run), "--web"))(r"(http://127\.0\.0\.1:\d+\S*)")[1]


def an_answer_is_open(page: Any) -> None:
    """A held-out prompt, its answer, and what every code would write at its third token."""
    page.wait_for_selector("#steered:not(.busy) .token", timeout=PATIENCE_MS)
    page.click('#steered [data-place="2"]')
    page.wait_for_selector("#open-head:has-text('Token 2:')", timeout=PATIENCE_MS)
    page.wait_for_selector("#beside:not(.busy) .panel:nth-child(3) .token", timeout=PATIENCE_MS)


def watching(places: Places) -> str:
    """The service's own address."""
    return places.stack.enter_context(serving("watch", str(places.run)))(r"(http://127\.0\.0\.1:\d+\S*)")[1]


def curves_are_drawn(page: Any) -> None:
    """The run has been read."""
    page.wait_for_selector(".uplot", timeout=PATIENCE_MS)


SHOTS = (
    Shot(name="watch", address=watching, prepare=curves_are_drawn, height=900),
    Shot(name="mlflow-charts", address=mlflow_charts, prepare=charts_are_drawn, height=680),
    Shot(name="explorer", address=lambda p: (p.run / "explorer.html").as_uri(), prepare=explorer_is_drawn),
    Shot(name="report", address=lambda p: (p.run / "report.html").as_uri(), height=1000),
    Shot(name="steering", address=steering, prepare=an_answer_is_open, height=900),
    Shot(name="report-curves", address=lambda p: (p.run / "report.html").as_uri() + "#curves"),
)


def small(png: bytes) -> bytes:
    """The same picture in few colours; ``SystemExit`` when it is still too large for a repository."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        buffer, "PNG", optimize=True
    )
    if buffer.tell() > MOST_BYTES:
        raise SystemExit(f"a picture has {buffer.tell()} bytes, more than {MOST_BYTES}: show less of the page")
    return buffer.getvalue()


def take(shots: list[Shot], places: Places, out: Path) -> None:
    """All pictures, each as ``out/<name>.png``."""
    from playwright.sync_api import sync_playwright

    chromium = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if chromium is None:
        raise SystemExit("there is no chromium on the path: apt-get install chromium")
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for shot in shots:
            page = browser.new_page(viewport={"width": WIDTH, "height": shot.height})
            page.goto(shot.address(places), timeout=PATIENCE_MS)
            shot.prepare(page)
            picture = small(page.screenshot())
            (out / f"{shot.name}.png").write_bytes(picture)
            print(f"{out / shot.name}.png  {len(picture) / 1000:.0f} kB", flush=True)
            page.close()
        browser.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN_A", help="a finished run")
    parser.add_argument("other", type=Path, metavar="RUN_B", help="another one in the same MLflow store")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--only", action="append", choices=[shot.name for shot in SHOTS], help="may be repeated")
    asked = parser.parse_args()
    with ExitStack() as stack:
        places = Places(run=asked.run.absolute(), other=asked.other.absolute(), stack=stack)
        take([shot for shot in SHOTS if not asked.only or shot.name in asked.only], places, asked.out)


if __name__ == "__main__":
    main()
