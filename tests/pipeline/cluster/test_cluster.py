"""Jobs on a Ray cluster: what is checked before, what travels, and, slow, a whole job on three nodes of which one
dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from cluster_fixtures import LocalCluster
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from configs.loading import load_config
from configs.schema import RunConfig
from pipeline import job
from pipeline.cli.main import app
from pipeline.cluster import connect, shared_storage
from pipeline.cluster import submit as jobs
from pipeline.cluster.connect import WORKER_ENVIRONMENT, worker_environment
from pipeline.preflight.resources import cluster_problems
from pipeline.runs.events import read_events
from pipeline.tracking.uris import read_record

pytest_plugins = ("rl_fixtures", "cluster_fixtures")
ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def wants(**sections: Any) -> RunConfig:
    return RunConfig(base={"model": "x"}, improve={}, **sections)


# -- resources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "nodes", "expected"),
    [
        ({"rollout": {"num_workers": 3}}, [{"CPU": 1.0}] * 3, []),
        (
            {"rollout": {"num_workers": 4}},
            [{"CPU": 1.0}] * 3,
            ["4 CPUs asked for", "the cluster's 3 nodes have 3", "add nodes"],
        ),
        (
            {"rollout": {"num_workers": 1, "cpus_per_worker": 2}},
            [{"CPU": 1.0}] * 3,
            ["rollout.cpus_per_worker", "no node has that"],
        ),
        ({"rollout": {"num_workers": 2, "gpus_per_worker": 0.5}}, [{"CPU": 8.0, "GPU": 1.0}], []),
        (
            {"rollout": {"gpus_per_worker": 1}},
            [{"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}],
            ["2 GPUs asked for", "nodes have 1"],
        ),
        (
            {"cluster": {"num_learners": 1, "gpus_per_learner": 2}},
            [{"CPU": 9.0, "GPU": 1.0}] * 2,
            ["cluster.gpus_per_learner", "no node"],
        ),
        ({}, [], ["CPUs asked for", "0 nodes", "the largest: 0 CPUs"]),
    ],
)
def test_what_a_config_needs_against_what_nodes_have(
    sections: dict[str, Any], nodes: list[dict[str, float]], expected: list[str]
) -> None:
    problems = cluster_problems(wants(**sections), nodes)
    assert bool(problems) == bool(expected) and all(text in "\n".join(problems) for text in expected), problems


def test_why_a_job_waits() -> None:
    actor = ("LMEnvRunner", {"CPU": 1.0, "GPU": 0.5})
    assert jobs.waiting_reason([], [{"CPU": 2}], {}) == ""
    assert jobs.waiting_reason([("A", {"CPU": 1.0})], [{"CPU": 2}], {}) == "waiting: 1 A (1 CPU each); in all: 2 CPU"
    nodes = [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0}]
    reason = jobs.waiting_reason([actor, actor, ("ReplayActor", {})], nodes, {"CPU": 3.0, "GPU": 0.5})
    assert (
        reason
        == "waiting: 2 LMEnvRunner (1 CPU + 0.5 GPU each), 1 ReplayActor (nothing each); in use: 3 of 3 CPU, 0.5 of 1 "
        "GPU"
    )


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("STOPPED", None, 130), ("STOPPED", 0, 130)],
)
def test_exit_code_is_the_drivers(status: str, driver: int | None, code: int) -> None:
    info = SimpleNamespace(status=JobStatus(status), driver_exit_code=driver, message="no runtime env")
    said: list[str] = []
    assert jobs.exit_code(info, said.append) == code
    assert ("no runtime env" in "".join(said)) == (driver is None and status == "FAILED")


@pytest.mark.parametrize(
    ("status", "driver", "lost"),
    [
        *[("FAILED", gone, True) for gone in (None, -9, 137)],
        *[("FAILED", own, False) for own in (1, 3, 130)],
        *[("SUCCEEDED", 0, False), ("STOPPED", None, False)],
    ],
)
def test_only_a_lost_driver_is_worth_another_try(status: str, driver: int | None, lost: bool) -> None:
    assert jobs.driver_lost(SimpleNamespace(status=JobStatus(status), driver_exit_code=driver)) == lost


# -- what travels ------------------------------------------------------------------------------------------------------


def test_staged_folder_runs_by_itself_and_the_base_moves_into_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_config(QUICKSTART, ["cluster.address=auto"])
    with jobs.staged(settings) as folder:
        names = {path.name for path in folder.iterdir()}
        assert names == {*jobs.PACKAGES, jobs.CONFIG} and not list(folder.rglob("__pycache__"))
        monkeypatch.chdir(folder)
        unpacked = load_config(folder / jobs.CONFIG)
        assert Path(unpacked.base.model) == folder / "configs/models/countdown-habit-1m"
        run_dir = tmp_path / "run"
        brought = job.with_files_brought(unpacked, run_dir)
        assert brought == job.with_files_brought(unpacked, run_dir), "submitted again"
        code = "import pipeline.cli.main as c; print(c.__file__)"
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True, timeout=60
        )
        assert found.stdout.strip() == str(folder / "pipeline" / "cli" / "main.py")
    assert not folder.exists()
    assert (
        Path(brought.base.model) == run_dir / "brought" / "countdown-habit-1m"
        and (Path(brought.base.model) / "config.json").is_file()
    )
    assert brought.model_copy(update={"base": settings.base}) == settings, "nothing else has changed"


def test_too_much_to_bring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LARGEST", 10)
    with pytest.raises(ValueError, match="Ray takes 0 MiB"), jobs.staged(load_config(QUICKSTART)):
        pass


def test_variables_that_the_job_sets_are_not_set_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert worker_environment() == WORKER_ENVIRONMENT
    around = {"runtime_env": {"working_dir": "gcs://x.zip", "env_vars": jobs.JOB_ENVIRONMENT}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(around))
    assert worker_environment().keys() == WORKER_ENVIRONMENT.keys() - jobs.JOB_ENVIRONMENT.keys() - {"PYTHONPATH"}


# -- storage -----------------------------------------------------------------------------------------------------------


def test_each_node_is_asked(ray_session: None, tmp_path: Path) -> None:
    config = wants(tracking={"uri": "http://127.0.0.1:9"})
    problems = shared_storage.shared_storage_problems(config, tmp_path / "run")
    assert len(problems) == 1 and "http://127.0.0.1:9 does not answer the driver" in problems[0]
    node = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
    (problem,) = shared_storage.storage_problems(tmp_path, [str(tmp_path), str(tmp_path / "absent")], node)
    assert (
        problem
        == f"node {next(iter(node.values()))}: {tmp_path / 'absent'} does not exist; put it on storage that all nodes "
        "mount"
    )
    assert not list(tmp_path.rglob(".probe*"))


def test_a_node_that_sees_other_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (unseen,) = shared_storage.probe_node(str(tmp_path / "other" / ".probe-1"), "n", [])
    assert "does not share" in unseen and "No such file" in unseen
    (tmp_path / ".probe-2").write_text(".probe-2")
    monkeypatch.setattr(shared_storage, "NEEDED", ("torch", "nothing_of_this_name"))
    assert shared_storage.probe_node(str(tmp_path / ".probe-2"), "n", []) == [
        "nothing_of_this_name not installed; all nodes need the same environment"
    ]
    assert shared_storage._arrived(tmp_path / ".probe-2", "n") and not shared_storage._arrived(
        tmp_path / ".probe-2", "m"
    )


# -- the command -------------------------------------------------------------------------------------------------------


def submit(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["submit", *arguments])
    return done.exit_code, done.output


def test_all_errors_before_anything_is_sent(tmp_path: Path) -> None:
    code, output = submit(str(QUICKSTART), "improve.updats=3", "--run-dir", "runs/x", "--address", "http://127.0.0.1:9")
    assert code == 2 and "did you mean improve.updates" in output and "--run-dir: runs/x is relative" in output
    code, output = submit(str(QUICKSTART), "--run-dir", str(tmp_path / "x"), "--address", "http://127.0.0.1:9")
    assert code == 2 and "--address: http://127.0.0.1:9" in output
    code, output = submit(
        str(QUICKSTART), "--run-dir", "/x", "--address", "http://127.0.0.1:9", "--retries", "2", "--no-wait"
    )
    assert code == 2 and "--retries: with --no-wait" in output


def test_paths_of_other_machines_are_warnings(tmp_path: Path) -> None:
    text = f"actions.init={tmp_path / 'on-the-cluster'}"
    code, output = submit(str(QUICKSTART), text, "--run-dir", str(tmp_path / "x"), "--address", "http://127.0.0.1:9")
    assert (
        code == 2
        and f"warning: actions.init: {tmp_path / 'on-the-cluster'} does not exist" in output
        and "--address" in output
    )


# -- a real cluster ----------------------------------------------------------------------------------------------------


TINY = [
    "actions.updates=2",
    "clone.updates=2",
    "actions.min_alive_share=0",
    "actions.evaluation_sequences=8",
    "clone.evaluation_sequences=8",
]
TINY += [
    "evaluation=null",
    "improve.prompts_per_update=6",
    "improve.group_size=2",
    "improve.checkpoint_every=1000",
    "rollout.num_workers=1",
]
TINY += ["cluster.learner_threads=1", "rollout.max_new_tokens=8"]


class Submitted:
    """A ``latent-control submit`` in a process of its own, its output line by line."""

    def __init__(self, cluster: LocalCluster, run_dir: Path, *overrides: str) -> None:
        command = [sys.executable, "-m", "pipeline", "submit", str(QUICKSTART), *TINY, *overrides]
        command += ["--address", cluster.address, "--run-dir", str(run_dir)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.run_dir, self.lines = run_dir, list[str]()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip() for line in iter(self.process.stdout.readline, ""))

    def metrics(self) -> list[dict[str, float]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [r for r in (json.loads(line) for line in lines if line.endswith("\n")) if r["stage"] == "improve"]

    def until(self, reached: Any, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not reached(self.metrics()):
            assert self.process.poll() is None and time.monotonic() < deadline, "\n".join(self.lines[-40:])
            time.sleep(0.2)

    def ended(self, seconds: float = 180) -> int:
        code = self.process.wait(seconds)
        self.reader.join(5)
        return code


def scale(cluster: LocalCluster, run_dir: Path, workers: int) -> None:
    command = [sys.executable, "-m", "pipeline", "scale", str(run_dir), "--rollout-workers", str(workers)]
    subprocess.run(command, cwd=ROOT, env=cluster.environment, check=True, timeout=60, capture_output=True)


def paced(tokens_per_second: int) -> list[str]:
    """Workers that take the time of 96 tokens per update at this rate, and no CPU."""
    return ["rollout.engine=simulated", f"rollout.engine_options={{tokens_per_second: {tokens_per_second}}}"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_nodes_one_to_three_workers_and_a_lost_node(cluster: LocalCluster, tmp_path: Path) -> None:
    """A job with one worker, scaled to three it works on all nodes; one is killed and replaced; all updates are made,
    each once."""
    updates = 300
    scaling = [
        f"improve.updates={updates}",
        "cluster.autoscale={max: 3, patience: 1000}",
        "cluster.worker_timeout_seconds=120",
    ]
    run = Submitted(cluster, tmp_path / "run", *scaling, *paced(60))
    run.until(lambda found: len(found) >= 2)
    assert {r["rollout_workers"] for r in run.metrics()} == {1} == {r["rollout_nodes"] for r in run.metrics()}
    scale(cluster, run.run_dir, 3)
    run.until(lambda found: found[-1]["rollout_nodes"] == 3)
    cluster.kill(cluster.nodes[-1])
    lost = len(run.metrics())
    run.until(lambda found: len(found) >= lost + 3 and found[-1]["rollout_nodes"] == 2)
    cluster.join(1)
    run.until(lambda found: found[-1]["rollout_nodes"] == 3)
    assert len(run.metrics()) < updates, "all of this while it ran"
    assert run.ended() == 0, "\n".join(run.lines[-40:])
    assert [r["step"] for r in run.metrics()] == list(range(1, updates + 1))
    assert json.loads((run.run_dir / "summary.json").read_text())["stages"]["improve"]["metrics"]["reward_last"] >= 0
    assert any("rollout workers: 1 -> 3" in line for line in run.lines)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_stops_the_job_and_its_actors_and_submitting_again_continues(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    from ray.util.state import list_actors

    settings = ["improve.updates=30", "improve.checkpoint_every=2", *paced(200)]
    first = Submitted(cluster, tmp_path / "run", *settings)
    first.until(lambda found: len(found) >= 5)
    first.process.send_signal(signal.SIGINT)
    assert first.ended() == 130
    stopped = len(first.metrics())
    assert 5 <= stopped < 30
    alive = [actor.class_name for actor in list_actors(address=cluster.address) if actor.state == "ALIVE"]
    assert not [name for name in alive if "JobSupervisor" not in name], alive
    again = Submitted(cluster, tmp_path / "run", *settings)
    assert again.ended() == 0, "\n".join(again.lines[-40:])
    assert [r["step"] for r in again.metrics()] == list(range(1, 31))
    record = read_record(first.run_dir)
    assert record is not None and set(record["runs"]) == {"actions", "clone", "improve"}
    other = Submitted(cluster, tmp_path / "run", "improve.updates=31", *settings[1:])
    assert other.ended() == 1 and any("holds a run of another config" in line for line in other.lines)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver_is_submitted_again_and_the_run_goes_on(cluster: LocalCluster, tmp_path: Path) -> None:
    run = Submitted(
        cluster, tmp_path / "run", "improve.updates=30", "improve.checkpoint_every=2", *paced(200), "--retries", "2"
    )
    run.until(lambda found: len(found) >= 5)
    psutil.Process(json.loads((run.run_dir / "process.json").read_text())["pid"]).kill()
    assert run.ended() == 0, "\n".join(run.lines[-40:])
    assert any("the driver was lost; submitted again in 5 s (1 of 2 times)" in line for line in run.lines)
    assert [r["step"] for r in run.metrics()] == list(range(1, 31))
    assert [event["kind"] for event in read_events(run.run_dir)].count("started") == 2


def test_rays_notice_of_its_log_level_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    with connect.without_notice():
        os.write(2, b"Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to 3\na warning\n")
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "a warning\nlater\n"
