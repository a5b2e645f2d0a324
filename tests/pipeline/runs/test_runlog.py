"""The run log: every step once in the file, also after a kill; lines people can read at 80 columns."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pipeline.console.displays import Display, PlainLines
from pipeline.console.progress import Ahead
from pipeline.runs.metrics_log import RunLog


class Tracked:
    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, float], int]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append((dict(metrics), step))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_total_adds_up_a_stage_and_passes_over_torn_lines(tmp_path: Path) -> None:
    from pipeline.runs.metrics_log import total

    lines = [
        {"stage": "improve", "tokens": 3.0},
        {"stage": "clone", "tokens": 5.0},
        {"stage": "improve"},
        {"stage": "improve", "tokens": None},
    ]
    (tmp_path / "m.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]) + '{"stage": "improve", "tokens": 9'
    )
    assert total(tmp_path / "m.jsonl", "improve", "tokens") == 6.0


def test_each_step_is_a_line_at_once_and_goes_to_the_tracker(tmp_path: Path) -> None:
    tracker = Tracked()
    log = RunLog(tmp_path / "run", quiet=True, tracker=tracker)
    log.log("clone", 1, {"loss": 0.5, "kl": float("nan")})
    found = records(tmp_path / "run")
    assert found[0].pop("time") > 1.6e9
    assert len(found[0].pop("crc32")) == 8
    assert found == [{"stage": "clone", "step": 1, "loss": 0.5, "kl": None}]
    log.log("clone", 2, {"loss": 0.25})
    assert len(records(tmp_path / "run")) == 2
    assert [step for _, step in tracker.calls] == [1, 2]
    assert tracker.calls[0][0]["loss"] == 0.5
    with pytest.raises(ValueError, match="cannot be called 'step'"):
        log.log("clone", 3, {"step": 1.0})


def test_truncate_drops_later_lines_of_that_stage_only(tmp_path: Path) -> None:
    log = RunLog(tmp_path, quiet=True)
    for step in (1, 2, 3):
        log.log("clone", step, {"loss": 1.0})
    for step in (1, 2, 3):
        log.log("improve", step, {"reward": 1.0})
    log.truncate("improve", 1)
    log.log("improve", 2, {"reward": 0.5})
    assert [(r["stage"], r["step"]) for r in records(tmp_path)] == [
        ("clone", 1),
        ("clone", 2),
        ("clone", 3),
        ("improve", 1),
        ("improve", 2),
    ]
    log.close()
    again = RunLog(tmp_path, quiet=True)
    again.truncate("clone", 0)
    again.log("clone", 1, {"loss": 2.0})
    assert [(r["stage"], r["step"]) for r in records(tmp_path)] == [("improve", 1), ("improve", 2), ("clone", 1)]


def test_a_line_torn_by_a_kill_goes_and_is_named(tmp_path: Path) -> None:
    RunLog(tmp_path, quiet=True).log("clone", 1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "clone", "step": 2, "lo')
    out = io.StringIO()
    log = RunLog(tmp_path, display=PlainLines(out))
    assert "dropped a torn or damaged line" in out.getvalue()
    log.log("clone", 2, {"loss": 1.0})
    assert [r["step"] for r in records(tmp_path)] == [1, 2]


def test_quiet_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, quiet=True)
    log.begin("clone", 2)
    log.log("clone", 1, {"loss": 1.0})
    log.message("hello")
    assert capsys.readouterr().out == ""
    assert len(records(tmp_path)) == 1


def test_the_display_hears_what_is_logged_and_what_an_earlier_start_did(tmp_path: Path) -> None:
    out = io.StringIO()
    RunLog(tmp_path, quiet=True).log("improve", 40, {"reward": 0.25})
    log = RunLog(tmp_path, display=PlainLines(out))
    log.begin("improve", 150)
    log.log("improve", 41, {"reward": 0.5})
    log.record("evaluate", 1, {"base/sampled": 0.5})
    log.done("improve")
    lines = [line[9:] if line[2] == ":" else line for line in out.getvalue().splitlines()]
    assert lines == ["improve: 150 updates, from update 40 on", "improve   41/150  reward 0.500", "improve: done in 0s"]


def test_the_display_is_closed_also_when_a_stage_fails(tmp_path: Path) -> None:
    closed: list[bool] = []

    class Closing(Display):
        def close(self) -> None:
            closed.append(True)

    log = RunLog(tmp_path, display=Closing())
    with pytest.raises(OSError, match="boom"), log.showing(Ahead(run_dir=tmp_path, stages={})):
        raise OSError("boom")
    assert closed == [True]
