"""A signal ends a program within seconds, whatever it is at, and its event names the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.runs.events import read_events

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, time
from pathlib import Path
from pipeline.runs.starts import noted
from pipeline.runs import interrupts
from pipeline.runs.events import Events
run = Path(sys.argv[1])
interrupts.end_on_signals()  # as the command line does
interrupts.PATIENCE, interrupts.LIMIT = 0.5, 1.5
def last_words(name):
    Events(run).note("stopped", f"ended by {name}, in the middle of its work")
def deaf(seconds):  # as Ray waits: in C, without the interpreter's lock
    import hashlib
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", int(seconds * 2_000_000))
def work():
    WORK
with noted(run), interrupts.listening(last_words):
    print("ready", flush=True)
    work()
"""
# Whoever started the tests may have had signals ignored (nohup), and ignored they would stay.
HEARD = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
)
STAGES = {
    "between updates": "\n    while True: interrupts.check(); time.sleep(0.01)",
    "in an update": "\n    while True: time.sleep(0.1)",
    "with nothing to save": "\n    with interrupts.at_once(): time.sleep(100)",
    "deaf in C": "\n    deaf(40)",
    "hidden by Ray": (
        "\n    try:\n        with interrupts.at_once(): time.sleep(100)"
        "\n    except KeyboardInterrupt: raise KeyboardInterrupt"
    ),
    "while Ray starts": (
        "\n    with interrupts.through_replacement():"
        "\n        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number)); time.sleep(100)"
    ),
    "while Ray starts, deaf in C": (
        "\n    with interrupts.through_replacement():"
        "\n        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number)); deaf(40)"
    ),
    "tidying up for ever": "\n    try: time.sleep(100)\n    finally: time.sleep(100)",
}


SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
CASES = [(stage, number) for stage in STAGES for number in SIGNALS]


def in_turn(case: tuple[str, signal.Signals]) -> bool:
    """Of every day: all signals in one stage, and one signal in every other."""
    place = list(STAGES).index(case[0])
    return place == 0 or case[1] == SIGNALS[place % 3]


@pytest.mark.parametrize(
    ("stage", "number"),
    [pytest.param(*case, marks=[] if in_turn(case) else [pytest.mark.slow]) for case in CASES],
)
def test_every_stage_heeds_a_signal_and_names_it(tmp_path: Path, stage: str, number: signal.Signals) -> None:
    code = PROGRAM.replace("WORK", STAGES[stage])
    code = f"{HEARD}\n{code}"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        asked = time.monotonic()
        process.wait(60)
    assert time.monotonic() - asked < 10
    last = read_events(tmp_path)[-1]
    assert last["kind"] == "stopped" and number.name in last["text"]


UPDATE = """
import sys, time
from pipeline.runs import interrupts
interrupts.PATIENCE, interrupts.LIMIT = 0.5, 5.0
with interrupts.listening():
    print("ready", flush=True)
    try:
        if sys.argv[1] == "whole":
            while True: interrupts.check(); time.sleep(0.01)
        while True: time.sleep(0.05)
    except interrupts.Stopped as stop:
        print("whole" if stop.whole else "half", flush=True)
"""


@pytest.mark.parametrize("state", ["whole", "half"])
def test_only_a_whole_state_is_saved(state: str) -> None:
    """An update that was abandoned has changed some of the weights: what it leaves is no checkpoint."""
    with subprocess.Popen([sys.executable, "-c", UPDATE, state], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().decode().strip() == state


COMMAND = """
import subprocess, sys, time
import pipeline.cli.main as program
def app(prog_name):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    WORK
program.app = app
program.main()
"""
WORKS = {"in Python": "time.sleep(60)", "tidying": "\n    try: time.sleep(60)\n    finally: child.kill()"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("work", WORKS)
def test_a_command_ends_with_all_it_started_and_says_by_its_code_that_it_is_not_done(
    work: str, number: signal.Signals
) -> None:
    code = f"{HEARD}\n{COMMAND.replace('WORK', WORKS[work])}"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()


def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path: Path) -> None:
    """As ``nohup`` asks for."""
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + PROGRAM.replace(
        "WORK",
        "\n    end = time.monotonic() + 2\n    while time.monotonic() < end: interrupts.check(); time.sleep(0.05)",
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        os.kill(process.pid, signal.SIGHUP)
        assert process.wait(30) == 0
    assert read_events(tmp_path)[-1]["kind"] == "finished"
