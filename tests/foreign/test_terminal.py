"""What is quoted from a model, a file or a verifier reaches the terminal escaped, brackets as brackets."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from configs.plain_text import escaped
from pipeline.cli.main import app
from pipeline.cli.output import echo, fitting, print_error, print_table
from pipeline.console.displays import LiveView, PlainLines
from pipeline.console.progress import Ahead
from pipeline.steering.terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = {
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJmCg==\x07",
    "C1": "\x9b31mred\x9d0;t\x9c",
    "return": "wrong\rright",
    "backspace": "no\x08\x08yes",
    "bidi": "\u202egnp.exe\u2066",
    "mark": "a\u061cb\u200fc",
    "hidden": "a\u200b\ufeff\u2060b",
    "separators": "one\u2028two\u2029",
    "surrogate": "\ud800",
    "delete": "\x7f",
}
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_it_is_escaped_wherever_it_is_printed(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    echo(text)
    print_error(f"error: {text}")
    print_table(f"title {text}", ["a"], [[text]])
    shown = capsys.readouterr()
    plain = PlainLines(into := io.StringIO())
    plain.begin(Ahead(run_dir=Path("x") / (text.replace("/", "_") or "x"), stages={"improve": 3}))
    plain.stage_begins("improve", 3)
    plain.message(text, "update_skipped")
    plain.step("improve", 1, {f"reward_{text}": 1.0})
    for written in (shown.out, shown.err, into.getvalue()):
        assert not OBEYED.search(written), repr(written)
    assert escaped(text) in shown.err


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_the_live_view_and_the_steering_terminal_escape_too(text: str) -> None:
    def letters(console: Console) -> str:
        written = console.file.getvalue()  # type: ignore[attr-defined]
        return re.sub("\x1b\\[[0-9;?]*[A-Za-z]|\r", "", written)  # rich's own movements

    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None, legacy_windows=False)
    view = LiveView(console)
    view.begin(Ahead(run_dir=Path("run"), stages={"improve": 3}))
    view.stage_begins("improve", 3)
    view.message(text, "update_skipped")
    view.step("improve", 1, {f"part_{text}": 1.0})
    view._other(f"a library says {text}")
    view.live.refresh()
    view.close()
    assert not OBEYED.search(letters(console)), repr(letters(console))
    talk = Terminal.__new__(Terminal)
    talk.console = Console(file=io.StringIO(), force_terminal=False, width=200)
    talk.say(Text(f"error: {text}"))
    assert not OBEYED.search(letters(talk.console))


def test_lines_tabs_and_letters_of_all_scripts_stay() -> None:
    text = "one\n\ttwo 北京 العربية עברית naïve — 🙂 [b]bold[/b]"
    assert escaped(text) == text


@pytest.mark.parametrize("name", ["a[/b]", "[red]x", "why?", "%41", "a b", "ü", "a[", "#x", "a%"])
def test_names_of_folders_are_taken_as_they_are(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for words in (["show", str(folder)], ["audit", str(folder)], ["resume", str(folder)], ["diagnose", str(folder)]):
        told = CliRunner().invoke(app, words)
        assert told.exit_code == 2 and name in told.output.replace("\n", ""), told.output
    quickstart = (ROOT / "configs" / "quickstart.yaml").read_text()
    (folder / "config.yaml").write_text(
        quickstart.replace("models/countdown-1m", str(ROOT / "configs/models/countdown-1m"))
    )
    told = CliRunner().invoke(app, ["runs", str(folder.parent)])
    assert told.exit_code == 0 and folder.name in told.output
    told = CliRunner().invoke(app, ["show", str(folder)])
    assert told.exit_code == 0


def test_warnings_and_defects_are_escaped_in_the_program(tmp_path: Path) -> None:
    """What the program itself does not print: the standard library's last resort, and Python's traceback."""
    code = (
        "import logging, sys\n"
        "import pipeline.cli.main as program\n"
        "def app(prog_name): logging.getLogger('x').warning('w \\x1b[2J'); raise RuntimeError('e \\x1b[2J \\u202e')\n"
        "program.app = app\n"
        "program.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and "w \\x1b[2J" in done.stderr and "e \\x1b[2J \\u202e" in done.stderr
    assert not OBEYED.search(done.stderr)


def test_a_wide_table_loses_columns_not_letters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head, rows = ["run", "status", "stage", "reward"], [["a-long-name", "finished", "improve", "0.500"]]
    # Widths with their frames: 14, 11, 10, 9, and 1 for the last rule.
    assert [fitting(head, rows, width) for width in (10, 35, 36, 44, 45)] == [2, 2, 3, 3, 4]
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_table("runs", head, rows, drop=True)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "a-long-name" in shown and "improve" in shown and "0.500" not in shown
    assert "left out at 40 columns: reward" in shown
