"""What a run shows: a live view that fits any terminal, plain lines in columns for logs, JSON lines for programs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.console import displays, progress
from pipeline.console.displays import COLUMNS, Display, LiveView, PlainLines, Writer, automatic
from pipeline.console.json_display import JsonLines
from pipeline.console.live_view import PLAIN_MARKS, view
from pipeline.console.progress import Ahead, RunProgress, clock, key_metrics, number, sparkline

ROOT = Path(__file__).resolve().parents[3]
STAGES = {"actions": 600, "clone": 500, "improve": 150, "evaluate": 3, "pages": 0}
UPDATE = {
    "reward": 0.5,
    "success": 0.25,
    "reward/length": -0.75,
    "tokens": 1536.0,
    "seconds_update_total": 0.75,
    "idle_learner": 0.76,
    "idle_workers": 0.28,
    "staleness_mean": 1.5,
    "staleness_max": 3.0,
    "rollouts_alive_codes": 61.0,
    "rollouts_code_perplexity": 40.123,
    "clip_share": 0.31,
    "entropy": 4.134,
}


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, to be set by hand."""
    found = [100.0]
    for module in (progress, displays):
        monkeypatch.setattr(module.time, "monotonic", lambda: found[0])
    return found


def play(display: Display, now: list[float]) -> None:
    """A run up to the middle of its reinforcement learning, three seconds an update."""
    seconds = {"evaluate": 20.0}
    display.begin(Ahead(run_dir=Path("runs/first"), stages=STAGES, seconds=seconds, num_actions=64, max_staleness=4))
    display.stage_begins("actions", 600)
    for step in range(1, 601):
        now[0] += 0.1
        display.step("actions", step, {"loss": 1 / step, "nll_codes": 0.25})
    display.stage_ends("actions", checkpoint="checkpoints/actions")
    display.stage_begins("clone", 500)
    display.stage_ends("clone", kept=True)
    display.stage_begins("improve", 150, [(40, {"reward": 0.1})])
    for step in range(41, 44):
        now[0] += 3.0
        display.step("improve", step, UPDATE | {"reward": step / 100})
    display.message("worker 2 was lost (killed), 1 in a row", "worker_lost")


def lines_of(run: RunProgress, width: int, height: int = 40) -> list[str]:
    return [line.plain for line in view(run, width=width, height=height)]


@pytest.fixture
def run(now: list[float]) -> RunProgress:
    shown = LiveView(Console(file=io.StringIO(), force_terminal=True, width=80))
    play(shown, now)
    shown.close()
    return shown._run


class TestLiveView:
    def test_it_holds_what_one_asks_at_80_columns(self, run: RunProgress) -> None:
        lines = lines_of(run, 80)
        assert lines[0].startswith("✔ actions   600/600   1m00s  loss 0.00167  nll_codes 0.250")
        assert lines[1].startswith("✔ clone     500/500  before")
        assert lines[2].startswith("▶ improve    43/150  ━━━━") and lines[2].endswith(" 29%  ETA 5m21s")
        assert lines[3] == "· evaluate  3 models, about 20s" and lines[4] == "· pages     "
        text = "\n".join(lines[5:])
        for wanted in (
            "reward    0.430",
            "▁███",
            "success 0.250",
            "2,048 tokens/s, 3.00 s/update",
            "learner 76%, workers 28%",
            "1.500 updates, at most 3, bound 4",
            "61 of 64 active, perplexity 40.1, in the rollouts",
            "entropy 4.134",
            "worker 2 was lost (killed)",
            "clip_share 0.310: large steps: lower improve.learning_rate",
            "1m09s so far, run ETA 5m41s + pages",
        ):
            assert wanted in text

    @pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 120, 200])
    @pytest.mark.parametrize("height", [3, 8, 12, 23, 60])
    def test_it_fits(self, run: RunProgress, width: int, height: int) -> None:
        shown = view(run, width=width, height=height)
        assert 0 < len(shown) <= height
        assert max(line.cell_len for line in shown) <= width
        assert height < 5 or any("43/150" in line.plain for line in shown)

    def test_a_terminal_of_ascii_gets_ascii(self, run: RunProgress) -> None:
        assert all(line.plain.isascii() for line in view(run, width=80, height=40, marks=PLAIN_MARKS))

    def test_between_stages_it_says_what_starts(self, run: RunProgress, now: list[float]) -> None:
        run.end("improve")
        assert "▶ evaluate  starting" in lines_of(run, 80)
        for name in ("evaluate", "pages"):
            run.begin(name, 0)
            run.end(name)
        assert lines_of(run, 80)[-1] == "  1m09s so far"

    def test_what_is_printed_stands_above_it(self, now: list[float]) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
        shown = LiveView(console)
        play(shown, now)
        shown.message("a [message] for people")
        shown.close()
        text = console.file.getvalue()
        assert "a [message] for people" in text and "43/150" in text.rpartition("a [message]")[2]
        assert not shown.live.is_started


class TestPlainLines:
    def text(self, now: list[float]) -> list[str]:
        out = io.StringIO()
        play(PlainLines(out), now)
        return out.getvalue().splitlines()

    def test_lines_fit_and_stand_in_columns(self, now: list[float]) -> None:
        lines = self.text(now)
        assert max(map(len, lines)) <= COLUMNS
        assert lines[0][9:] == "run first: actions 600, clone 500, improve 150, evaluate 3, pages"
        assert lines[1][9:] == "actions: 600 updates"
        updates = [line for line in lines if line.startswith("improve ")]
        assert updates[-1] == "improve   43/150  reward 0.430  success 0.250   2048 tok/s  ETA 5m41s+"
        assert len({line.index("success") for line in updates}) == 1
        assert lines[-1][9:] == "warning: worker 2 was lost (killed), 1 in a row"

    def test_quick_steps_share_a_line_and_slow_ones_have_their_own(self, now: list[float]) -> None:
        actions = [int(line[8:12]) for line in self.text(now) if line.startswith("actions ")]
        assert actions[0] == 1 and actions[-1] == 600
        assert 10 <= len(actions) <= 14, "a minute of steps, a line per 5 seconds"
        out, slow = io.StringIO(), []
        plain = PlainLines(out)
        plain.stage_begins("improve", 4)
        for step in (1, 2, 3):
            now[0] += 6.0
            plain.step("improve", step, {"reward": 0.5})
            slow.append(out.getvalue().count("reward"))
        assert slow == [1, 2, 3]

    def test_the_last_step_of_a_stage_that_ends_early_is_shown(self, now: list[float]) -> None:
        out = io.StringIO()
        plain = PlainLines(out)
        plain.stage_begins("clone", 500)
        for step in (1, 2, 3):
            plain.step("clone", step, {"loss": 0.5})
        plain.stage_ends("clone")
        assert "clone      3/500  loss 0.500" in out.getvalue()

    def test_a_reader_that_goes_away_does_not_end_the_run(self) -> None:
        tried = []

        class Gone(io.StringIO):
            def write(self, text: str) -> int:
                tried.append(text)
                raise BrokenPipeError

        writer = Writer(Gone())
        writer.line("one")
        writer.line("two")
        assert tried == ["one\n"]

    def test_a_log_without_unicode_gets_question_marks(self) -> None:
        raw = io.BytesIO()
        log = io.TextIOWrapper(raw, encoding="ascii")
        Writer(log).line("✔ done")
        assert raw.getvalue() == b"? done\n"


class TestJsonLines:
    def test_every_line_is_an_object_of_one_event(self, now: list[float]) -> None:
        out = io.StringIO()
        shown = JsonLines(out)
        play(shown, now)
        shown.evaluation({"improved": {"sampled": 0.5, "nll": float("nan")}})
        events = [json.loads(line) for line in out.getvalue().splitlines()]
        kinds = [event["event"] for event in events]
        assert kinds[0] == "start" and events[0]["stages"] == STAGES and events[0]["run_dir"] == "runs/first"
        assert kinds.count("step") == 603 and events[-3]["reward/length"] == -0.75
        ends = [event for event in events if event["event"] == "stage_end"]
        assert (
            ends[0]["checkpoint"] == "checkpoints/actions" and abs(ends[0]["seconds"] - 60) < 1e-6 and ends[1]["kept"]
        )
        assert [e["done"] for e in events if e["event"] == "stage_start"] == [0, 0, 40]
        assert events[-2]["kind"] == "worker_lost" and events[-1]["result"] == {
            "improved": {"sampled": 0.5, "nll": None}
        }


class TestChoice:
    def test_a_terminal_gets_the_view_and_all_else_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def chosen(**terminal: object) -> type[Display]:
            return type(automatic(Console(file=io.StringIO(), **terminal)))

        monkeypatch.setenv("TERM", "xterm")
        assert chosen(force_terminal=True) is LiveView
        assert chosen(force_terminal=False) is PlainLines
        monkeypatch.setenv("TERM", "dumb")
        assert chosen(force_terminal=True) is PlainLines

    def test_forced_colours_make_no_terminal_of_a_log_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        assert isinstance(automatic(), PlainLines)


SCRIPT = """
import os, pathlib, subprocess, sys, time
from pipeline.console.displays import automatic
from pipeline.console.progress import Ahead
shown = automatic()
shown.begin(Ahead(run_dir=pathlib.Path("first"), stages={"improve": 4}))
shown.stage_begins("improve", 4)
for step in (1, 2, 3):
    shown.step("improve", step, {"reward": step / 4})
    time.sleep(0.3)
os.write(2, b"from C code\\n")
subprocess.run(["sh", "-c", "echo from a child"])
print("from Python")
shown.step("improve", 4, {"reward": 1.0})
time.sleep(0.3)
shown.stage_ends("improve")
shown.close()
print("after it")
"""


def on_a_terminal(code: str, **environment: str) -> str:
    """What a program writes to a terminal of 80 x 24."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    env |= {"TERM": "xterm", "PYTHONPATH": str(ROOT)} | environment
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=env, close_fds=True
    )
    os.close(theirs)
    text = b"".join(read_all(ours)).decode()
    assert child.wait(60) == 0, text
    return text


def read_all(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux's end of a terminal
            part = b""
        if not part:
            os.close(terminal)
            return
        yield part


@pytest.mark.skipif(os.name != "posix", reason="terminals of this kind")
def test_on_a_real_terminal_the_view_moves_and_others_lines_survive() -> None:
    text = on_a_terminal(SCRIPT)
    assert "\x1b[1A" in text and "\x1b[32m" in text, "the cursor goes up, and there is colour"
    last = text.rindex("improve")
    for line in ("from C code", "from a child", "from Python"):
        assert line in text and text.index(line) < last, f"{line} has to stand above the view"
    assert text.rstrip().endswith("after it")
    assert "\x1b[32m" not in on_a_terminal(SCRIPT, NO_COLOR="1")
    dumb = on_a_terminal(SCRIPT, TERM="dumb")
    assert "\x1b" not in dumb and "improve  4/4  reward     1" in dumb


def test_short_forms() -> None:
    assert [number(x) for x in (3.0, 0.51234, 1234.5, 3.14159e-5, 0.0, float("nan"), float("inf"), 2e7)] == [
        *("3", "0.512", "1.23e+03", "3.14e-05", "0", "nan", "inf", "2e+07")
    ]
    assert [clock(s) for s in (0.4, 59, 320, 3725)] == ["0s", "59s", "5m20s", "1h02m"]
    assert sparkline([0.0, 1.0, 0.5]) == "▁█▅"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.0, 1.0, 1.0], 2) == "▁█"
    assert key_metrics({"x": 1.0, "train/loss": 2.0, "reward": 3.0}, 2) == [("reward", 3.0), ("loss", 2.0)]
