"""One process works on a run, and is known by more than its number."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.loading import dump_config, load_config
from pipeline.cli.main import app
from pipeline.cli.options import USAGE
from pipeline.cli.session import new_folder
from pipeline.runs import manifest
from pipeline.runs.errors import AtWorkError
from pipeline.runs.process import at_work, at_work_elsewhere, is_alive, read_process
from pipeline.runs.status import overview

ROOT = Path(__file__).resolve().parents[2]
HOLD = (
    "import sys, time; from pathlib import Path; from pipeline.runs.process import at_work\n"
    "with at_work(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["tracking.enabled=false"])
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


@contextmanager
def held(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process works on the run."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            yield other
        finally:
            other.kill()


def test_a_second_process_is_refused_until_the_first_one_ends_however_it_does(run: Path) -> None:
    with held(run) as other:
        assert overview(run).status == "running"
        with pytest.raises(AtWorkError, match=rf"process {other.pid} on {socket.gethostname()}"), at_work(run):
            pass
        assert read_process(run)["pid"] == other.pid  # the refused one left it alone
        assert str(other.pid) in at_work_elsewhere(run)
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert overview(run).status == "interrupted" and not at_work_elsewhere(run)
        with at_work(run):
            assert read_process(run)["pid"] == os.getpid()
    assert read_process(run) == {}


def test_resume_beside_a_run_at_work_ends_with_2_and_no_advice_to_resume_it(run: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with held(run) as other:
        told = CliRunner().invoke(app, ["resume", str(run)])
        assert told.exit_code == USAGE and str(other.pid) in told.output and "continue with" not in told.output
        told = CliRunner().invoke(app, ["run", str(run / "config.yaml"), "--run-dir", str(run)])
        assert told.exit_code == USAGE
        told = CliRunner().invoke(
            app, ["submit", str(run / "config.yaml"), "--run-dir", str(run), "--address", "http://127.0.0.1:9"]
        )
        assert told.exit_code == USAGE and str(other.pid) in told.output
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_child_that_outlives_the_holder_does_not_keep_the_run(run: Path) -> None:
    code = HOLD.replace("time.sleep(600)", "import subprocess; subprocess.Popen(['sleep', '60']); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", code, str(run)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        time.sleep(0.5)
        other.kill()
        other.wait()
        with at_work(run):
            pass
        other.stdout.close()


@pytest.mark.parametrize("change", ["birth", "boot", "older record", "host"])
def test_a_number_that_the_system_gave_out_again_is_not_the_run(run: Path, change: str) -> None:
    with held(run) as other:
        record = read_process(run)
        assert is_alive(record, 0.0)
        boot, _, ticks = record["birth"].partition("/")
        if change == "birth":
            record["birth"] = f"{boot}/{int(ticks) - 1}"
        elif change == "boot":
            record["birth"] = f"00000000-0000-0000-0000-000000000000/{ticks}"
        elif change == "older record":  # without a birth: begun before the process that has its number now
            del record["birth"]
            assert is_alive(record, 0.0)
            record["started"] -= 3600
        else:
            record |= {"host": "elsewhere", "started": 0.0}
        assert not is_alive(record, 0.0)
        other.kill()


def test_a_dead_process_that_nobody_waited_for_is_dead(run: Path) -> None:
    with held(run) as other:
        record = read_process(run)
        other.kill()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not is_alive(record, 0.0)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "not json", '{"host": 1, "pid": "x", "started": null}', '{"pid": -1}']
)
def test_a_damaged_record_is_nobody(run: Path, text: str) -> None:
    (run / "process.json").write_text(text)
    assert read_process(run) == {} and overview(run).status == "interrupted"
    with at_work(run):
        assert json.loads((run / "process.json").read_text())["pid"] == os.getpid()


def test_commands_of_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form, *rest: "20260101-000000")
    found = [new_folder(None, "quickstart") for _ in range(3)]
    assert len(set(found)) == 3 and all(folder.is_dir() for folder in found)


def test_an_unused_name_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("improve: {updates: -1}")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", "bad.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == USAGE and [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize("name", ["why?", "%41", "a=b", "a#b", "back\\slash", "esc\x1b[2J", "in%20/x", "in?/x"])
def test_a_name_that_a_later_stage_could_not_use_is_refused_before_anything_starts(tmp_path: Path, name: str) -> None:
    told = CliRunner().invoke(
        app, ["run", str(ROOT / "configs" / "quickstart.yaml"), "--run-dir", str(tmp_path / name)]
    )
    assert told.exit_code == USAGE and "--run-dir" in told.output and "\x1b" not in told.output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_on_a_file_system_without_locks_the_record_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """NFS without its lock service, FUSE: a run starts, and a second one is refused all the same."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with at_work(tmp_path):
        manifest.put(tmp_path, "config.yaml", b"a: 1\n", keep=True)
        with pytest.raises(AtWorkError, match=f"process {os.getpid()} on"), at_work(tmp_path):
            pass
    with at_work(tmp_path):
        assert not manifest.problems(tmp_path).keys() & {"config.yaml", "manifest.json"}
