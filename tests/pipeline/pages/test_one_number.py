"""One number under one name: all that is shown of a run (terminal, summary.json, report, explorer, watch) is collected
and compared."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_fixtures
from typer.testing import CliRunner

from configs.schema import Explorer
from pipeline.cli.main import app
from pipeline.cli.output import closing_words
from pipeline.pages.explorer.records import Dataset
from pipeline.pages.explorer.write import explain
from pipeline.pages.records import ReportPage
from pipeline.pages.report import codebook, results
from pipeline.pages.report.build import build
from pipeline.runs.metrics_log import ends
from pipeline.runs.status import overview
from pipeline.storage import checksummed_jsonl
from pipeline.watch.followed_run import FollowedRun

pytest_plugins = ("rl_fixtures", "explorer_fixtures")
Told = tuple[str, str, str, str]
"""(where it is shown, model, name, text)"""
MEASURED = {
    "policy_alive_codes": 7.0,
    "policy_code_perplexity": 5.4321,
    "inverse_dynamics_alive_codes": 6.0,
    "inverse_dynamics_code_perplexity": 4.8765,
    "nll": 0.31549,
    "nll_rise": 0.16049,
    "kl_to_base": 0.24804,
    "coverage": 0.99609,
}
"""Of the improved model; others have a tenth more of each."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every measure that is shown, each with its own digits."""
    folder = report_fixtures.make_run(tmp_path_factory.mktemp("runs") / "first")
    summary = json.loads((folder / "summary.json").read_text())
    for variant in ("cloned", "improved"):
        scale = 1.0 if variant == "improved" else 1.1
        summary["evaluation"][variant] |= {name: scale * value for name, value in MEASURED.items()}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def evaluation(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())["evaluation"]
    return found


@pytest.fixture(scope="module")
def report(run: Path) -> ReportPage:
    return build(run)


def on_terminal(run: Path) -> Iterator[Told]:
    """The table of successes, and the lines ``name: model value, model value``."""
    for line in closing_words(run).splitlines():
        words = line.split()
        if words and words[0] in report_fixtures.SOLVED and words[1] != "-":  # no difference of two
            yield "terminal", words[0], "sampled", words[1]
            yield "terminal", words[0], "greedy", words[5]
        name, colon, rest = line.partition(": ")
        if colon and re.fullmatch(r"(\w+ [-+.\d]+(, )?)+", rest):
            for model, text in (pair.split() for pair in rest.split(", ")):
                yield "terminal", model, name, text


def in_report(report: ReportPage) -> Iterator[Told]:
    """All tables with a column for each model, and the table of successes."""
    names = {label: key for key, label in (*results.MEASURES, *codebook.HEALTH)}
    models = {results.shown(name): name for name in report_fixtures.SOLVED}
    for table in (table for section in report.sections for table in section.tables):
        for row in table.rows:
            for head, text in zip(table.head[1:], row[1:], strict=True):
                if row[0] in names and head in models and text != "\u2013":
                    yield f"report, {table.title}", models[head], names[row[0]], text
                if row[0] in models and head in ("sampled", "greedy") and table.title.startswith("Success"):
                    yield f"report, {table.title}", models[row[0]], head, text


def agrees(text: str, value: float) -> bool:
    """Whether ``text`` is ``value``, rounded to the digits that it shows."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace(",", "").replace("\u2212", "-")) - value) <= 0.5000001 * 10.0**-digits


def test_the_collectors_see_what_is_shown(run, report):
    counted = Counter(name for _, _, name, _ in (*on_terminal(run), *in_report(report)))
    assert {name: counted[name] for name in MEASURED} == {
        "nll": 8,  # every model has one, in both places
        "nll_rise": 4,
        "kl_to_base": 4,
        **{name: 4 for name in MEASURED if name.startswith(("policy", "inverse", "coverage"))},
        "inverse_dynamics_alive_codes": 2,  # the terminal leaves it out
    }
    assert counted["sampled"] == counted["greedy"] == 8


def test_terminal_and_report_show_the_summarys_numbers(run, report, evaluation):
    wrong = [
        told for told in (*on_terminal(run), *in_report(report)) if not agrees(told[3], evaluation[told[1]][told[2]])
    ]
    assert wrong == []


def test_a_wrong_number_is_found():
    assert agrees("0.316", 0.3155) and agrees("54.0", 53.98) and agrees("1,804,160", 1804160.0)
    assert not agrees("0.315", 0.3161) and not agrees("54", 55.2)


def test_no_name_stands_for_two_figures_or_rows(report):
    figures = [figure for section in report.sections for figure in section.figures]
    assert len({figure.name for figure in figures}) == len({figure.title for figure in figures}) == len(figures)
    for section in report.sections:
        for table in section.tables:
            if table.title != "Verdicts":
                assert len({row[0] for row in table.rows}) == len(table.rows), table.title
    labels = [label for _, label in (*results.MEASURES, *codebook.HEALTH)]
    assert len(set(labels)) == len(labels)


def test_watch_shows_what_runs_and_report_show(run, report):
    followed, at_a_glance = FollowedRun(run), overview(run)
    followed.poll()
    state = json.loads(followed.parts["state"])
    assert (state["status"], state["reward"]) == (at_a_glance.status, at_a_glance.reward)
    listed = CliRunner().invoke(app, ["runs", str(run.parent)], env={"COLUMNS": "200"}).output
    assert f"{state['reward']:.3f}" in listed and f"{at_a_glance.success:.3f}" in listed
    assert {name: value for name, value, _ in report.tiles}["status"] == at_a_glance.status
    drawn = {figure.title: figure for section in report.sections for figure in section.figures}
    for figure in json.loads(followed.parts["curves"]):
        twin = drawn[figure["title"]]
        assert [curve["y"] for curve in figure["curves"]] == [pytest.approx(curve.y, rel=1e-3) for curve in twin.curves]


def test_the_explorers_rewards_and_successes_are_the_summarys(explored_run, tmp_path):
    rewards = [0.1 + 0.01 * number for number in range(25)]
    copy = Path(shutil.copytree(explored_run, tmp_path / "run"))
    lines = [
        checksummed_jsonl.line({"stage": "improve", "step": number + 1, "reward": reward, "success": reward / 2})
        for number, reward in enumerate(rewards)
    ]
    (copy / "metrics.jsonl").write_text("".join(lines))
    (copy / "evaluation.json").write_text(json.dumps({"cloned": {"sampled": 0.25}, "improved": {"sampled": 0.625}}))
    (dataset,), _ = explain(copy, tmp_path / "explorer.html", Explorer(seconds=0.0))
    assert isinstance(dataset, Dataset)
    shown = dataset.summary
    # 0.10 to 0.19 and 0.25 to 0.34, by hand
    assert (shown.reward_first, shown.reward_last) == pytest.approx((0.145, 0.295))
    assert (shown.reward_first, shown.reward_last) == ends(rewards)  # as stages/improve.py writes it
    assert (shown.success_first, shown.success_last) == pytest.approx((0.0725, 0.1475))
    assert dict(shown.evaluation) == {"cloned": 0.25, "improved": 0.625}
