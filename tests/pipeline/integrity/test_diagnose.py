"""``latent-control diagnose``: one cause, its evidence and the next command, for each way a run can end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.loading import dump_config
from configs.schema import Cluster, RunConfig
from pipeline.integrity.diagnose import diagnose
from pipeline.rl.worker_health import Health
from pipeline.runs.errors import RunError
from pipeline.runs.events import Events
from pipeline.runs.layout import STALL
from pipeline.runs.metrics_log import RunLog
from pipeline.runs.starts import noted
from pipeline.storage import disk_space


def run_folder(tmp_path: Path, updates: int = 3) -> Path:
    """One that has a config and has logged some updates."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(RunConfig(base={"model": "m"}, actions={}, clone={}, improve={})))
    log = RunLog(folder, quiet=True)
    for step in range(1, updates + 1):
        log.log("improve", step, {"reward": 0.5, "driver_gib": 0.5, "worker_gib": 0.5, "rollout_workers": 2})
    log.close()
    return folder


def too_many_deaths(_: Path) -> None:
    health = Health(Cluster(max_worker_deaths=1))
    for _ in range(2):
        health.died(1)


def full_disk(_: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")


def raising(error: BaseException) -> Callable[[Path], None]:
    def fail(_: Path) -> None:
        raise error

    return fail


ENDS = [
    (full_disk, RunError, "failed", "the disk is full", "df -h {run}"),
    (too_many_deaths, RunError, "failed", "rollout workers die again and again", "latent-control doctor"),
    (
        raising(RunError("verifiers could not judge 9 of 16 rollouts (reward_error: KeyError)")),
        RunError,
        "failed",
        "the reward function or its data fails",
        "latent-control task check",
    ),
    (
        raising(FloatingPointError("update 3 was broken")),
        FloatingPointError,
        "failed",
        "updates broke",
        "latent-control audit {run}",
    ),
    (
        raising(TimeoutError("no rollout worker has been there for 4 s; queued [8], down are workers [1, 2]")),
        TimeoutError,
        "failed",
        "rollout workers fell silent",
        "latent-control resume {run}",
    ),
    (
        raising(RunError("improve lost a part of itself once more than cluster.max_rebuilds=3: the actor died")),
        RunError,
        "failed",
        "parts of the cluster were lost more often",
        "latent-control resume {run}",
    ),
    (raising(KeyError("colour")), KeyError, "failed", "KeyError: 'colour'", "latent-control resume {run}"),
    (
        raising(KeyboardInterrupt("SIGTERM")),
        KeyboardInterrupt,
        "stopped",
        "asked it to end: ended by SIGTERM",
        "latent-control resume {run}",
    ),
]


@pytest.mark.parametrize(("end", "error", "state", "cause", "command"), ENDS, ids=[f"{e[2]}-{e[3][:24]}" for e in ENDS])
def test_the_cause_of_each_end(
    tmp_path: Path, end: Callable[[Path], None], error: type[BaseException], state: str, cause: str, command: str
) -> None:
    folder = run_folder(tmp_path)
    with pytest.raises(error), noted(folder):
        Events(folder).note("worker_lost", "worker 1 was lost (killed), 1 in a row", worker=1)
        end(folder)
    found = diagnose(folder)
    assert (found.state, cause in found.cause, command.format(run=folder) in found.next) == (state, True, True), found
    assert found.evidence


def test_what_ended_without_a_word(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    Events(folder).note("started", "started by process 1 on here")
    found = diagnose(folder)
    assert (found.state, found.next) == (
        "killed",
        f"latent-control resume {folder}",
    ) and "killed without a word" in found.cause
    assert any("improve 3" in line for line in found.evidence)
    (folder / STALL).write_text('Thread 0x1 (most recent call first):\n  File "/x.py", line 1 in wait\n')
    assert "no update was finished within cluster.stall_seconds" in diagnose(folder).cause


def test_one_that_hangs_and_one_that_works(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    Events(folder).note("started", "started by process 1 on here")
    (folder / "process.json").write_text(
        json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "started": time.time()})
    )
    assert "at work, and nothing went wrong so far" in diagnose(folder).cause
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    old = [
        {k: v for k, v in line.items() if k != "crc32"} | {"time": time.time() - 7200 + line["step"]} for line in lines
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    hanging = diagnose(folder)
    assert "something hangs" in hanging.cause and hanging.next.startswith(f"kill {os.getpid()}")


def test_one_that_finished_in_spite_of_something(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    with noted(folder):
        Events(folder).note("tracking_away", "the MLflow store is away: refused")
    assert (
        diagnose(folder).cause == "it finished, in spite of 1 x tracking away"
        and diagnose(folder).next == f"latent-control sync {folder}"
    )


def test_a_full_disk_is_seen_in_what_a_worker_handed_over() -> None:
    """Ray wraps a worker's error; safetensors has one of its own."""
    wrapped = RuntimeError("ray::ReplayActor.flush()")
    wrapped.cause = OSError(28, "No space left on device")  # type: ignore[attr-defined]
    assert disk_space.is_full(wrapped) and disk_space.is_full(
        RuntimeError("I/O error: No space left on device (os error 28)")
    )
    assert not disk_space.is_full(OSError(2, "No such file or directory"))
