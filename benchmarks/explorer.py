"""The explorer's page: its size, how soon it is interactive, axe-core's findings, requests, errors; does its gain add
up to the real one?

    python benchmarks/explorer.py --runs runs/countdown-a runs/countdown-b      (finished runs, which are only read)

Pages of 2,000 rollouts with 64 and with 128 codes are made up, at 24 tokens a rollout and at the most that a page
takes; hostile texts are among their words. *Interactive* is the time from the start of navigation to the first view
rendered (the page's load event is over and it was painted) plus the time from a click on another view to that view's
next frame. Needs playwright, a chromium on the path, and AXE_CORE naming axe-core's axe.min.js. Exit code 1 when a bar
is missed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import ROOT, arguments, report

sys.path.insert(0, str(ROOT / "tests"))  # the made-up dataset is the tests' own

VIEWS = ("gain", "codes&code=3", "rollouts", "rollouts&rollout=12", "training", "where", "policy", "compare")
BARS = {"megabytes": 5.0, "interactive_ms": 1000.0}
CLICK = """async () => {
  const navigation = performance.getEntriesByType("navigation")[0];
  const [paint] = performance.getEntriesByName("first-contentful-paint");
  const started = performance.now();
  [...document.querySelectorAll("#views a")].find((a) => a.textContent === "Rollouts").click();
  while (document.querySelector("main h2").textContent !== "Rollouts") await new Promise(requestAnimationFrame);
  await new Promise(requestAnimationFrame);
  const first_view = Math.max(navigation.loadEventEnd, paint ? paint.startTime : 0);
  return {first_view, click: performance.now() - started};
}"""
GO = "hash => { location.hash = hash; window.dispatchEvent(new Event('hashchange')); }"


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; ``SystemExit`` where there is none."""
    from playwright.sync_api import sync_playwright

    path = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if path is None:
        raise SystemExit("there is no chromium on the path: apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def interactive(browser: Any, address: str, repeats: int) -> list[dict[str, float]]:
    """Milliseconds of the first view and of a click, after one load to warm up."""
    found = []
    for _ in range(repeats + 1):
        tab = browser.new_page()
        tab.goto(address, wait_until="load")
        found.append(tab.evaluate(CLICK))
        tab.close()
    return found[1:]


def faults(browser: Any, address: str, axe: str) -> dict[str, list[str]]:
    """What is wrong in any view, light and dark: axe-core's serious and critical findings, messages on the console,
    requests, texts run."""
    found: dict[str, list[str]] = {"axe": [], "console": [], "requests": [], "hostile": []}
    for scheme in ("light", "dark"):
        tab = browser.new_page(color_scheme=scheme)
        tab.on("pageerror", lambda error: found["console"].append(str(error)))
        tab.on(
            "console", lambda said: found["console"].append(said.text) if said.type in ("error", "warning") else None
        )
        tab.on("request", lambda asked: None if asked.url.startswith("file:") else found["requests"].append(asked.url))
        tab.goto(address)
        tab.evaluate(axe)  # by the debugger, which the page's policy does not bind
        for view in VIEWS:
            tab.evaluate(GO, f"#view={view}")
            violations = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
            found["axe"] += [
                f"{scheme} {view}: {v['id']}" for v in violations if v["impact"] in ("serious", "critical")
            ]
            found["hostile"] += ["an element"] * tab.locator("main img, main script").count()
        found["hostile"] += ["a script ran"] if tab.evaluate("window.pwned") is not None else []
        tab.close()
    return found


def made_up_pages(folder: Path, quick: bool) -> dict[str, Path]:
    """By name, the page of two runs of each shape."""
    from explorer_data import made_up

    from pipeline.pages.explorer.build import TOKENS_SHOWN
    from pipeline.pages.explorer.page import write_page

    count = 40 if quick else 2000
    shapes = {
        "64 codes": (64, 24, 24),
        "128 codes": (128, 24, 24),
        "128 codes, longest": (128, TOKENS_SHOWN // 2000, 8),
    }
    found = {}
    for name, (codes, tokens, explained) in shapes.items():
        dataset = made_up(8 if quick else codes, count, tokens, explained=explained)
        found[name] = write_page([dataset], folder / f"{name}.html")
    return found


def gain_of(run_dir: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """What the page says RL gained and what the run's own evaluation found, both with 95 % intervals."""
    from configs.schema import Explorer
    from pipeline.pages.explorer.build import explore
    from pipeline.pages.explorer.page import write_page

    page = write_page([explore(run_dir, Explorer(seconds=seconds, explained=1))[0]], folder / f"{run_dir.name}.html")
    (data,) = re.findall(
        r'<script type="application/json" '
        r'id="data">(.*?)</script>',
        page.read_text(encoding="utf-8"),
        re.S,
    )
    run = json.loads(data)["runs"][0]
    said, parts = run["summary"]["gain"], sum(code["gain"]["mean"] for code in run["codes"])
    evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    before = next(name for name in ("offline", "finetuned", "cloned") if name in evaluation)
    real = evaluation["differences"][f"improved - {before}"]["sampled"]
    half = math.hypot(said["high"] - said["mean"], (real["high"] - real["low"]) / 2)
    return {
        "run": run_dir.name,
        "gain_on_the_page": said,
        "sum_of_the_codes_parts": parts,
        "rollouts": run["summary"]["path_rollouts"],
        "real_gain": real,
        "apart": said["mean"] - real["mean"],
        "interval_of_that": half,
        "agrees": abs(said["mean"] - real["mean"]) <= half and abs(parts - said["mean"]) < 0.01,
        "page": str(page),
    }


def measured(
    browser: Any, pages: dict[str, Path], axe: str, repeats: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows of the table, raw times and faults by page)."""
    rows, raw = [], {}
    for name, path in pages.items():
        times = interactive(browser, path.as_uri(), repeats)
        wrong = faults(browser, path.as_uri(), axe)
        both = [one["first_view"] + one["click"] for one in times]
        rows.append(
            {
                "page": name,
                "megabytes": path.stat().st_size / 1e6,
                "interactive_ms": statistics.median(both),
                "first view": statistics.median(one["first_view"] for one in times),
                "click": statistics.median(one["click"] for one in times),
                **{kind: len(list_) for kind, list_ in wrong.items()},
            }
        )
        raw[name] = {"times": times, "faults": wrong}
    return rows, raw


def missed(rows: Sequence[dict[str, Any]], gains: Sequence[dict[str, Any]]) -> list[str]:
    """Which bars are not met."""
    over = [
        f"{row['page']}: {name} is {row[name]:.3g}" for row in rows for name, most in BARS.items() if row[name] >= most
    ]
    faulty = [
        f"{row['page']}: {row[kind]} x {kind}"
        for row in rows
        for kind in ("axe", "console", "requests", "hostile")
        if row[kind]
    ]
    apart = [f"{one['run']}: its gain is {one['apart']:+.3f} from the real one" for one in gains if not one["agrees"]]
    return over + faulty + apart


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="*",
        default=[],
        help="finished runs: does the page's gain add up to the evaluation's?",
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="explorer.seconds for those")
    asked = parser.parse_args()
    axe = os.environ.get("AXE_CORE")
    if axe is None:
        raise SystemExit(
            "AXE_CORE does not name axe-core's axe.min.js: npm pack axe-core, unpack it, and name the file"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        gains = [gain_of(run.absolute(), folder, asked.seconds) for run in asked.runs]
        pages = made_up_pages(folder, asked.quick) | {f"run {one['run']}": Path(one.pop("page")) for one in gains}
        with chromium() as browser:
            rows, raw = measured(browser, pages, Path(axe).read_text(encoding="utf-8"), asked.repeats)
    bad = missed(rows, gains)
    for one in gains:
        print(
            f"{one['run']}: page {one['gain_on_the_page']['mean']:+.3f}, real {one['real_gain']['mean']:+.3f}, "
            f"agrees: {one['agrees']}"
        )
    report(
        "explorer",
        rows,
        {"bars": BARS, "missed": bad, "gains": gains, "pages": raw, "load_average": os.getloadavg()},
        asked.out,
    )
    if bad and not asked.quick:
        raise SystemExit("missed: " + "; ".join(bad))


if __name__ == "__main__":
    main()
