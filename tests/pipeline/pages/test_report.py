"""The run report: numbers by hand, runs that are not finished, hostile texts, pictures with their words."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from report_fixtures import CODES, HOSTILE, PROMPTS, make_run, outcomes
from typer.testing import CliRunner

from configs.loading import load_config
from pipeline.cli.main import app
from pipeline.cli.options import USAGE
from pipeline.cli.output import closing_words
from pipeline.pages.page import report_page as page
from pipeline.pages.records import ReportPage, ReportSection, number
from pipeline.pages.report.build import build
from pipeline.pages.report.codebook import usage_of
from pipeline.pages.report.cost import peak_gib
from pipeline.pages.report.curves import band, half_width
from pipeline.pages.report.examples import answers_of, change, gained_and_lost
from pipeline.pages.report.write import write_at_end
from pipeline.runs.context import StageContext
from pipeline.runs.metrics_log import RunLog
from pipeline.tracking import lineage
from rollout_workers.tasks.countdown import Countdown, CountdownOptions

T2, T1 = 4.30265, 12.7062  # Student's t at 0.975, 2 and 1 degrees of freedom


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "all")


@pytest.fixture(scope="module")
def report(run: Path) -> ReportPage:
    return build(run)


def section(report: ReportPage, name: str) -> ReportSection:
    return next(s for s in report.sections if s.name == name)


def test_a_band_by_hand() -> None:
    mean, low, high = band(np.array([1.0, 2.0, 3.0]), 1)
    assert mean.tolist() == [1.5, 2.0, 2.5]
    assert high[1] - 2.0 == pytest.approx(T2 * 1.0 / 3**0.5, rel=1e-4)  # standard deviation 1
    assert 1.5 - low[0] == pytest.approx(T1 * 0.5**0.5 / 2**0.5, rel=1e-4)  # the window is cut: 1 and 2
    assert math.isnan(band(np.array([1.0]), 3)[1][0]), "one value has no interval"
    assert [half_width(n) for n in (5, 150, 1500)] == [2, 5, 50]


def test_the_interval_covers_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(400, 11))
    inside = [low[5] < 0 < high[5] for _, low, high in (band(row, 5) for row in draws)]
    assert 0.92 < np.mean(inside) < 0.98


def test_held_out_plays_have_wilsons_interval(report: ReportPage) -> None:
    figure = next(f for f in section(report, "curves").figures if f.name == "heldout")
    curve = next(c for c in figure.curves if c.name == "improve, sampled")
    assert curve.x == [10, 20, 30] and curve.y == [0.5] * 3 and curve.kind == "marks"
    # 50 of 100: centre 0.5, half width 1.96 sqrt(0.25 / 100 + 0.0384 / 400) / 1.0384 = 0.0962.
    assert (curve.low[0], curve.high[0]) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))


def test_both_levels_share_the_reward_figure(report: ReportPage) -> None:
    figure = next(f for f in section(report, "curves").figures if f.name == "reward")
    assert [c.name for c in figure.curves] == ["improve, mean of 5 updates", "token level, mean of 5 updates"]
    assert "mean of 5 and 5 neighbouring" in figure.note
    # Updates 3 to 7 around 5: mean 5/30, standard deviation sqrt(2.5) / 30.
    middle = figure.curves[0]
    assert middle.y[4] == pytest.approx(5 / 30)
    assert middle.high[4] - middle.y[4] == pytest.approx(2.77645 * 2.5**0.5 / 30 / 5**0.5, rel=1e-4)


def test_gained_and_lost_by_hand(report: ReportPage) -> None:
    answers = answers_of(outcomes(), "greedy")
    gained, lost = gained_and_lost(answers, ["base", "cloned"], "improved")
    assert [key[0] for key in gained] == [f"countdown/heldout/{i}" for i in (1, 3, 5, 7, 9, 11, 13)]
    assert [key[0] for key in lost] == ["countdown/heldout/4", "countdown/heldout/16"]
    # Base solves 0, 2, ..., 18; improved 0 to 14 but 4: seven even ones of both, 4, 16 and 18 lost, 15, 17 and 19
    # neither.
    assert change(answers["base"], answers["improved"]) == [7, 3, 7, 3]
    shown = section(report, "examples")
    assert [(g.total, len(g.examples)) for g in shown.galleries] == [(7, 7), (2, 2)]
    assert shown.galleries[1].examples[0].answers[-1] == ("improved", f"{HOSTILE} answer 4 of improved", False)
    assert ["token level → improved, greedy", "5", "1", "9", "5"] in [list(r) for r in shown.tables[0].rows]


def test_prompts_are_told_apart_by_text_too() -> None:
    one, two = (answers_of([o], "sampled")["base"] for o in outcomes()[:2])
    assert change(one, two) == [0, 0, 0, 0]


def test_usage_at_the_end_by_hand(report: ReportPage) -> None:
    rows = [{"actions": [0, 0, 1, 1], "policy_version": 0}, {"actions": [2, 2], "policy_version": 7}]
    assert usage_of(rows[:1], 4, span=2).tolist() == [1, 1, 0, 0]
    assert usage_of(rows, 4, span=2).tolist() == [0, 0, 1, 0]
    codebook = section(report, "codebook")
    assert f"{CODES} codes, one for each token." in codebook.lines
    assert any("1 codes are active" in line and "is 1.0" in line for line in codebook.lines), "in the end code 7 alone"


def test_the_verdict_claims_no_more_than_the_interval(report: ReportPage) -> None:
    said = section(report, "result").lines[0]
    assert (
        "Against base: sampled +0.250 (+0.100 to +0.400), better, greedy -0.010 (-0.100 to +0.100), no "
        "significant difference." in said
    )
    success = section(report, "result").tables[0]
    assert [row[:3] for row in success.rows][-1] == ["token level", "0.500", "0.100 to 0.500"]
    assert [row[1] for row in section(report, "gates").tables[0].rows] == ["passed", "FAILED"]


def test_cost_adds_up(report: ReportPage) -> None:
    rows = {row[0]: row for row in section(report, "cost").tables[0].rows}
    assert rows["improve"] == ["improve", "20s", "20.0", "30", "240", "2,400", "434,816", "2.00"]  # 1 + 2 x 0.5 GiB
    assert rows["actions"][-1] == "0.75", "the driver's peak where no worker was"
    assert rows["evaluate"][:3] == ["evaluate", "12s", "12.5"]
    assert peak_gib([], None) is None


def test_how_to_do_it_again_names_the_commit_and_its_changes(report: ReportPage) -> None:
    again = section(report, "reproduce")
    assert "git checkout abc\n" in again.commands[0][1] and "latent-control reproduce" in again.commands[1][1]
    assert "changed since commit abc" in again.warnings[0]
    assert [link.target for link in section(report, "links").links] == ["explorer.html"]


def test_hostile_texts_stay_data(report: ReportPage) -> None:
    text = page(report)
    assert text.isascii() and text.count("<script") == 2 and "<img" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]  # type: ignore[index]
    assert not set("<>&") & set(data) and "{{DATA}}" in data
    galleries = next(s for s in json.loads(data)["sections"] if s["name"] == "examples")["galleries"]
    assert galleries[1]["examples"][0]["answers"][-1][1].startswith(HOSTILE)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]  # type: ignore[index]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert "connect-src" not in policy and " style=" not in text
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text.split("<script")[0])


def test_figures_are_numbers_that_a_page_can_draw(report: ReportPage) -> None:
    figures = {f.name: f for s in report.sections for f in s.figures}
    assert {"success-rates", "reward", "heldout", "code-usage", "loss-actions"} <= figures.keys()
    for figure in figures.values():
        for curve in figure.curves:
            assert len(curve.x) == len(curve.y) and len(curve.low) == len(curve.high) in (0, len(curve.x)), figure.name
    rates = figures["success-rates"]
    assert [c.name for c in rates.curves] == ["sampled", "greedy"] and {c.kind for c in rates.curves} == {"marks"}
    # Base is the first of four models: 0.500 (0.100 to 0.500) sampled, as the fixture has it.
    assert rates.labels[0] == "base" and round(rates.curves[0].x[0]) == 0
    assert (rates.curves[0].y[0], rates.curves[0].low[0], rates.curves[0].high[0]) == (0.5, 0.1, 0.5)
    usage = figures["code-usage"]
    assert usage.labels[0] == "7" and usage.curves[0].y[0] == 1.0, "in the end code 7 alone"
    assert [(c.name, c.y[0]) for c in usage.curves[1:]] == [
        ("uniform (1/N)", 1 / CODES),
        ("active threshold", 0.1 / CODES),
    ]


def test_the_verdict_on_collapse_is_the_summarys(run: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert not any("codebook after RL" in line for line in section(build(folder), "codebook").lines)
    summary = json.loads((folder / "summary.json").read_text())
    verdict = {"marginal": [8.0, 2.0], "verdict": "collapse", "acting": 1, "probed": 4, "reasons": ["why"]}
    (folder / "summary.json").write_text(json.dumps(summary | {"collapse": verdict}))
    said = "codebook after RL: collapse (2.0 effective codes, 8.0 before; why)"
    report = build(folder)
    assert said in section(report, "codebook").lines and ("codebook after RL", "collapse", "bad") in report.tiles
    assert said in closing_words(folder).splitlines()


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0.1234, 63.0, 1.0, 1234567.0, math.nan, 0.00001)] == [
        "0.123",
        "63",
        "1.000",
        "1,234,567",
        "–",
        "1e-05",
    ]


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "config.yaml").write_text((make_run(tmp_path / "all") / "config.yaml").read_text())
    text = page(build(folder))
    assert "has not been evaluated" in text and "Nothing has been logged yet" in text and "not judged yet" in text
    lines = (tmp_path / "all" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:8]))
    rows = section(build(folder), "cost").tables[0].rows
    assert [row[0] for row in rows] == ["actions (not finished)", "token_level (not finished)"]


def test_the_command_writes_the_page_and_says_what_is_on_it(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(run), "-o", str(tmp_path / "deep" / "r.html")])
    assert done.exit_code == 0, done.output
    assert (
        "against base, sampled: +0.250 (+0.100 to +0.400)" in done.output
        and "not in MLflow: the run was not tracked" in done.output
    )
    text = (tmp_path / "deep" / "r.html").read_text()
    assert f'"target":"{(run / "explorer.html").as_uri()}"' in text, "links hold from another folder, too"
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == USAGE


def test_the_end_of_a_run_writes_it_unless_told_not_to_and_never_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run")

    def context(*changes: str) -> StageContext:
        config = load_config(folder / "config.yaml", list(changes), check_paths=False)
        return StageContext(config=config, run_dir=folder, log=RunLog(folder), task=Countdown())

    write_at_end(context("report.enabled=false"))
    assert not (folder / "report.html").exists()
    write_at_end(context("report.examples=1"))
    assert (folder / "report.html").is_file()
    (folder / "report.html").unlink()
    (folder / "summary.json").write_text("{")
    write_at_end(context())
    assert not (folder / "report.html").exists() and "report: not written: " in capsys.readouterr().out


def test_hashes_follow_bytes(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    assert len(lineage.replay_hash(one)) == 64 and lineage.replay_hash(one) == lineage.path_hash(one)
    assert lineage.replay_hash(one) != lineage.replay_hash(two), (
        "other runs, other rollouts: the file has the run's name"
    )
    assert lineage.replay_hash(tmp_path) == lineage.stage_hash(tmp_path) == lineage.base_hash(tmp_path) == ""
    assert lineage.config_hash(one) == lineage.config_hash(two)
    few, many = (Countdown(CountdownOptions(numbers=n)) for n in (3, 4))
    digests = {lineage.prompts_hash(task, split, {}) for task in (few, many) for split in ("train", "heldout")}  # type: ignore[arg-type]
    assert len(digests) == 4 and lineage.prompts_hash(few, "train", {}) in digests
    rows = tmp_path / "rows.jsonl"
    found = []
    for text in ("a", "b"):
        rows.write_text(text)
        found.append(lineage.prompts_hash(few, "train", {"path": str(rows)}))
    assert found[0] != found[1], "a file goes in whole"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nothing to hash"):
        lineage.path_hash(tmp_path / "empty")


def test_the_fixture_is_what_the_numbers_above_are_about() -> None:
    rates = {name: sum(o.success for o in found.values()) for name, found in answers_of(outcomes(), "greedy").items()}
    assert rates == {"base": 10, "cloned": 5, "improved": 14, "token_level": 10} and PROMPTS == 20
    assert json.loads(json.dumps(HOSTILE)) == HOSTILE
