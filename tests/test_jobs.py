"""Runs as Ray jobs: what fits, what travels; and, marked slow, a cluster of three nodes on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_config
from pipeline.jobs import SUBMITTED, bundles, misfits, stage

pytest_plugins = ("rl_fixtures",)

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SMALL = ["actions.updates=2", "clone.updates=2", "improve.updates=4", "evaluation=null", "cluster.learner_threads=1"]


def test_what_fits_is_counted_by_node_and_in_all() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}]
    assert misfits(nodes, {"rollout worker": (2, {"CPU": 1, "GPU": 0.5}), "learner": (1, {"CPU": 4, "GPU": 0})}) == []
    assert misfits(nodes, {"rollout worker": (3, {"CPU": 1, "GPU": 0.5})}) == [
        "1.5 GPUs are needed (3 rollout workers x 0.5), the cluster has 1: ask for fewer, or add nodes"
    ]
    # enough CPUs in all, but on no single node
    assert misfits(nodes, {"learner": (1, {"CPU": 5})}) == ["a learner needs 5 CPU on one node, but the nodes have at most 4 CPU"]
    # a GPU and its CPUs must be on the same node
    (problem,) = misfits([{"CPU": 8.0}, {"CPU": 1.0, "GPU": 2.0}], {"learner": (1, {"CPU": 2, "GPU": 1})})
    assert "on one node" in problem
    assert len(misfits([], {"rollout worker": (1, {"CPU": 1})})) == 2


def test_a_run_asks_for_its_workers_and_learners() -> None:
    config = load_config(QUICKSTART, ["rollout.num_workers=3", "cluster.num_learners=2", "rollout.gpus_per_worker=0.25"])
    assert bundles(config) == {"rollout worker": (3, {"CPU": 1.0, "GPU": 0.25}), "learner": (2, {"CPU": 1.0, "GPU": 0.0})}
    assert bundles(load_config(QUICKSTART, ["improve=null", "evaluation=null"])) == {}


def test_what_travels_is_all_a_run_needs(tmp_path: Path) -> None:
    stage(load_config(QUICKSTART, ["improve.updates=3"]), tmp_path)
    sent = load_config(tmp_path / SUBMITTED)
    assert sent.cluster.address == "auto" and sent.improve is not None and sent.improve.updates == 3
    assert Path(sent.base.model) == tmp_path / "configs" / "models" / "countdown-1m"
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 20 * 2**20
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "pipeline", "config", "check", SUBMITTED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_a_node_does_not_see_is_said_before_work_starts(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import cluster

    cluster.require_shared(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(cluster.ray, "get", lambda refs, timeout: ["[Errno 2] No such file or directory"] * len(refs))
    with pytest.raises(ValueError, match=r"not seen by the nodes .* storage that all nodes share"):
        cluster.require_shared(tmp_path)
    assert not list(tmp_path.iterdir())


# -- three nodes -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of three nodes of one CPU. Each has its own folder: nodes that share one clear away each other's working directories."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    port, dashboard = free_port(), free_port()
    head = ["--head", "--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    nodes: list[subprocess.Popen[bytes]] = []
    # Short: names of sockets below it have at most 107 characters.
    folders = [Path(f"/tmp/lc{os.getpid()}-{number}") for number in range(3)]
    try:
        for folder, words in zip(folders, (head, *[["--address", f"127.0.0.1:{port}"]] * 2), strict=True):
            more = ["--num-cpus", "1", "--temp-dir", str(folder), "--dashboard-agent-listen-port", str(free_port()), "--block"]
            command = [str(Path(sys.executable).with_name("ray")), "start", *words, *more, "--disable-usage-stats"]
            nodes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            wait_for(dashboard if words is head else None)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(timeout=60)


def wait_for(port: int | None, seconds: float = 90.0) -> None:
    """Until somebody listens at ``port``."""
    deadline = time.monotonic() + seconds
    while port is not None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, f"nobody listens at {port}"
        time.sleep(0.5)


def submit(address: str, run_dir: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", "submit", str(QUICKSTART), "--address", address, "--run-dir", str(run_dir), *words]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def nodes_there(address: str, count: int) -> None:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from pipeline.jobs import nodes_of

    deadline = time.monotonic() + 90
    while len(nodes_of(address)) < count:
        assert time.monotonic() < deadline
        time.sleep(1)


@pytest.mark.slow
def test_a_job_runs_on_all_nodes_and_goes_on_after_ctrl_c(cluster: str, tmp_path: Path) -> None:
    nodes_there(cluster, 3)
    refused = submit(cluster, tmp_path / "run", "rollout.num_workers=30")
    told, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2 and "30 CPUs are needed" in told

    first = submit(cluster, tmp_path / "run", *SMALL, "rollout.num_workers=3", "improve.updates=400")
    told = read_until(first, "improve  3/400")
    first.send_signal(signal.SIGINT)
    rest, _ = first.communicate(timeout=120)
    assert first.returncode == 130 and "is stopped" in rest, told + rest

    # The same command goes on with the run that is there; its config has been saved with 400 updates, which is too long for a test.
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(saved.read_text().replace("updates: 400", "updates: 6"))
    second = submit(cluster, tmp_path / "run", *SMALL, "rollout.num_workers=3")
    told, _ = second.communicate(timeout=300)
    assert second.returncode == 0, told
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps: list[Any] = [record["step"] for record in records if record["stage"] == "improve"]
    assert max(steps) >= 6


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if text in line:
            return told
    raise AssertionError(told)
