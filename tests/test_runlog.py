"""The run log: every step once in the file, also after a kill; lines people can read at 80 columns."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import runlog
from pipeline.runlog import RunLog, clock, key_metrics, number, sparkline


class Tracked:
    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, float], int]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append((dict(metrics), step))


def plain() -> Console:
    return Console(file=io.StringIO(), soft_wrap=True, force_terminal=False)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_total_adds_up_a_stage_and_passes_over_torn_lines(tmp_path: Path) -> None:
    from pipeline.runlog import total

    lines = [
        {"stage": "improve", "tokens": 3.0},
        {"stage": "clone", "tokens": 5.0},
        {"stage": "improve"},
        {"stage": "improve", "tokens": None},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]) + '{"stage": "improve", "tokens": 9')
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
    console = plain()
    log = RunLog(tmp_path, console=console)
    assert "dropped a torn or damaged line" in console.file.getvalue()
    log.log("clone", 2, {"loss": 1.0})
    assert [r["step"] for r in records(tmp_path)] == [1, 2]


def test_plain_lines_are_short_and_hold_the_key_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    console = plain()
    log = RunLog(tmp_path, console=console)
    metrics = {
        "learning_rate": 1e-4,
        "tokens": 1234.0,
        "rewards/success": 0.25,
        "kl": 3.14159e-5,
        "rewards/reward": 0.5,
        "a_metric_with_a_long_name": 1.0,
    }
    with log.stage("improve", 150):
        for step in (41, 42, 43):
            now[0] += 3.0
            log.log("improve", step, metrics)
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("improve   41/150  reward 0.500  success 0.250  kl 3.14e-05")
    assert lines[2] == "improve   43/150  reward 0.500  success 0.250  kl 3.14e-05  3.0s  ETA 5m21s"
    assert all(len(line) <= 80 for line in lines)


def test_quiet_shows_nothing(tmp_path: Path) -> None:
    console = plain()
    log = RunLog(tmp_path, quiet=True, console=console)
    with log.stage("clone", 2):
        log.log("clone", 1, {"loss": 1.0})
        log.message("hello")
    assert console.file.getvalue() == ""
    assert len(records(tmp_path)) == 1


def test_terminal_shows_progress_curve_and_messages(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    log = RunLog(tmp_path, console=console)
    with log.stage("improve", 4):
        for step in range(1, 4):
            log.log("improve", step, {"reward": step / 4})
        log.message("a [message] for people")
        assert log._live is not None
        log._live.refresh()
    text = console.file.getvalue()
    assert "3/4" in text
    assert "▁▅█" in text
    assert "a [message] for people" in text
    assert log._live is None


def test_the_stage_ends_also_when_it_fails(tmp_path: Path) -> None:
    log = RunLog(tmp_path, console=plain())
    with pytest.raises(OSError, match="boom"), log.stage("clone", 4):
        raise OSError("boom")
    with log.stage("improve", 2):
        log.log("improve", 1, {"reward": 1.0})


def test_short_forms() -> None:
    assert [number(x) for x in (3.0, 0.51234, 1234.5, 3.14159e-5, 0.0, float("nan"), float("inf"), 2e7)] == [
        *("3", "0.512", "1.23e+03", "3.14e-05", "0", "nan", "inf", "2e+07")
    ]
    assert [clock(s) for s in (0.4, 59, 320, 3725)] == ["0s", "59s", "5m20s", "1h02m"]
    assert sparkline([0.0, 1.0, 0.5]) == "▁█▅"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""
    assert key_metrics({"x": 1.0, "train/loss": 2.0, "reward": 3.0}, 2) == [("reward", 3.0), ("loss", 2.0)]
