"""``resume`` takes nothing away: not of a finished run, not when the config was changed, not when it is interrupted."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from replay_rows import rollout
from run_fixtures import command
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.replay.writer import ReplayWriter
from pipeline.run import evaluated, nothing_left, resume
from pipeline.runs.events import read_events
from pipeline.runs.summary import read_summary
from pipeline.stages.improve import run_id_of

pytest_plugins = ("run_fixtures",)


@pytest.fixture
def finished(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    shutil.copy(small_run.parent / "mlflow.db", tmp_path / "mlflow.db")
    return run


def everything(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and hash of all that is there, hidden files and folders too."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [folder, *folder.rglob("*")]
    }


def edited(run: Path, section: str, key: str, change: Callable[[float], float]) -> tuple[str, str]:
    """A number of the config changed: (before, after)."""
    text = (run / "config.yaml").read_text()
    place = re.search(rf"(?:^{section}:.*?\n  )?{key}: (\S+)\n", text[text.index(f"{section}:") :], re.DOTALL)
    assert place is not None
    at = text.index(f"{section}:") + place.start(1)
    after = f"{change(float(place[1])):g}"
    (run / "config.yaml").write_text(text[:at] + after + text[at + len(place[1]) :])
    return place[1], after


@pytest.mark.parametrize("version", ["this", "before"])
def test_of_a_finished_run_nothing_is_touched(finished: Path, version: str) -> None:
    if version == "before":  # without hashes of logs and results, without locks
        from pipeline.storage.atomic import sealed, unseal

        content = unseal(finished / "manifest.json")
        files = {name: known for name, known in content["files"].items() if not name.startswith(("/", "checkpoints"))}
        (finished / "manifest.json").write_bytes(sealed({"files": files, "texts": content["texts"]}))
        for lock in finished.glob(".*lock"):
            lock.unlink()
    before = everything(finished)
    told = CliRunner().invoke(app, ["resume", str(finished)])
    assert told.exit_code == 0 and "finished: nothing left to do" in told.output
    assert everything(finished) == before


def test_it_says_so_to_programs_too(finished: Path) -> None:
    done = subprocess.run(command("resume", str(finished), "--json"), capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and lines[-1]["exit_code"] == 0
    assert any("nothing left to do" in json.dumps(line) for line in lines)


@pytest.mark.parametrize("lost", [(), ("manifest.json",), ("manifest.json", "summary.json", "evaluation.json")])
@pytest.mark.parametrize(("stage", "more"), [("improve", 3), ("improve", -1), ("clone", 40)])
def test_the_old_result_is_not_passed_off_as_one_of_the_new_config(
    finished: Path, lost: tuple[str, ...], stage: str, more: int
) -> None:
    before, after = edited(finished, stage, "updates", lambda value: value + more)
    for name in lost:
        (finished / name).unlink()
    whole = {name: found for name, found in everything(finished).items() if "lock" not in name and name != "."}
    told = CliRunner().invoke(app, ["resume", str(finished)])
    assert told.exit_code == 1
    assert f"{stage}.updates: {before} before, {after} now" in told.output and "--run-dir" in told.output
    there = everything(finished)
    assert {name: there[name] for name in whole} == whole


@pytest.mark.parametrize(("section", "key"), [("seed", "seed"), ("improve", "group_size"), ("actions", "batch_size")])
def test_other_settings_of_a_finished_stage_are_refused_with_both_values(
    finished: Path, section: str, key: str
) -> None:
    before, after = edited(finished, section, key, lambda value: 2 * value + 1)
    (finished / "manifest.json").unlink()
    with pytest.raises(ValueError, match=rf"{key}: {before} before, {after} now"):
        resume(finished)


def test_putting_the_value_back_is_enough(finished: Path) -> None:
    edited(finished, "improve", "updates", lambda value: value + 3)
    with pytest.raises(ValueError, match="--restore-config does that"):
        resume(finished)
    edited(finished, "improve", "updates", lambda value: value - 3)
    assert nothing_left(finished)


def test_a_replaced_result_is_not_taken_for_the_stages_own(finished: Path) -> None:
    shutil.rmtree(finished / "checkpoints" / "improve")
    shutil.copytree(finished / "checkpoints" / "clone", finished / "checkpoints" / "improve")
    assert not nothing_left(finished)


def test_what_must_be_made_again_is_known(finished: Path) -> None:
    assert evaluated(finished, read_summary(finished))
    (finished / "report.html").unlink()
    assert not nothing_left(finished) and evaluated(finished, read_summary(finished))
    (finished / "evaluation.parquet").unlink()
    assert not evaluated(finished, read_summary(finished))


def ended(run: Path, number: int, ready: Callable[[], bool]) -> tuple[int, float, str]:
    """Exit code, seconds from the signal to the end, and what was said, of a ``resume`` that is sent a signal."""
    with subprocess.Popen(command("resume", str(run)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 400
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        asked = time.monotonic()
        said, _ = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - asked, said.decode()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 129)])
def test_an_interrupted_evaluation_leaves_the_old_one_in_place(finished: Path, number: int, code: int) -> None:
    (finished / "evaluation.parquet").unlink()
    before = read_summary(finished)
    kept = (finished / "evaluation.json").read_bytes()
    log = finished / "events.jsonl"
    starts = len([event for event in read_events(finished) if event["kind"] == "started"])

    def evaluating() -> bool:
        started = [event for event in read_events(finished) if event["kind"] == "started"]
        return len(started) > starts and time.time() - started[-1]["time"] > 20

    found, seconds, said = ended(finished, number, evaluating)
    assert found == code and seconds < 10, said
    assert f"ended by {signal.Signals(number).name}" in log.read_text()
    after = read_summary(finished)
    assert after["evaluation"] == before["evaluation"] and (finished / "evaluation.json").read_bytes() == kept
    left = [one.info["cmdline"] for one in psutil.process_iter(["cmdline"])]
    assert not [words for words in left if words and str(finished) in " ".join(words)]


def test_a_run_that_was_renamed_goes_on_in_its_rows(tmp_path: Path) -> None:
    before, after = tmp_path / "first" / "replay", tmp_path / "second" / "replay"
    assert run_id_of(before, "improve") == "first-improve"
    first = ReplayWriter(before, 8, "first-improve")
    first.add([rollout(0)])
    first.close()
    before.parent.rename(after.parent)
    assert run_id_of(after, "improve") == "first-improve" and run_id_of(after, "token") == "second-token"
    again = ReplayWriter(after, 8, run_id_of(after, "improve"))
    assert again.add([rollout(0)]).duplicates == 1
