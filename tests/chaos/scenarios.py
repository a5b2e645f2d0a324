"""What is done to runs, and what it cost: the slow tests hold these numbers to the bars, ``benchmarks/chaos.py`` writes
them down."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from chaos_tools import GROUP, PROMPTS, UPDATES, WORKER, Run, assert_undisturbed, assert_whole, running

from pipeline.integrity.diagnose import diagnose
from pipeline.runs import manifest
from pipeline.runs.events import read_events
from pipeline.tracking.sync import sync
from pipeline.tracking.uris import read_record

ENDLESS = 1_000_000
REWARD = """
import time

def reward(row, response):
    time.sleep({seconds})
    return float(len(response) % 3)

calls = 0

def fails(row, response):
    global calls
    calls += 1
    if calls > 20:  # after the check before the run, in the midst of it
        raise KeyError("no such key")
    return 0.5
"""


def paced(folder: Path, seconds: float, function: str = "reward") -> list[str]:
    """Overrides by which each response takes a reward function so long: updates by the clock, not by how busy the
    machine is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward.py").write_text(REWARD.format(seconds=seconds))
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} {i + 1} {i + 2}", "answer": f"{i}"}) + "\n" for i in range(64))
    )
    own = f"{{path: {folder / 'reward.py'}, function: {function}}}"
    return [f"task={{name: jsonl, options: {{path: {folder / 'rows.jsonl'}, verifier: python, python: {own}}}}}"]


def worker_kills(folder: Path, checkpoint: Path, kills: int, last: int) -> dict[str, Any]:
    """So many workers are killed (SIGKILL), each once both are at work again; then ``last`` more updates.

    Seconds until the one that was started in its place is past its start and an update was made; rollouts lost or
    doubled.
    """
    run = Run(folder / "run", checkpoint, *paced(folder, 0.02), "improve.checkpoint_every=50", updates=ENDLESS).start()
    chance, strength = random.Random(0), []
    with running(run):
        run.reach(2)
        for _ in range(kills):
            victim = chance.choice(run.actors(WORKER))
            victim.kill()
            killed = time.monotonic()
            _until(lambda victim=victim: _at_work(run, victim), 600, run)
            strength.append(time.monotonic() - killed)
            run.reach(run.steps()[-1] + 3)
        run.signal(signal.SIGTERM)
        run.end(0)
        updates = run.steps()[-1] + last
        finish_at(run, updates)
    assert_whole(run, updates)
    rows = run.rollouts()
    return {
        "kills": kills,
        "losses noted": Counter(event["kind"] for event in read_events(run.folder))["worker_lost"],
        "updates": updates,
        "rollouts lost": updates * PROMPTS * GROUP - rows.rollout_id.nunique(),
        "rollouts doubled": len(rows) - rows.rollout_id.nunique(),
        "seconds": strength,
    }


def finish_at(run: Run, updates: int) -> None:
    """Change the config on purpose, so that the run ends there, and go on to that end."""
    config = run.folder / "config.yaml"
    text = config.read_text()
    assert f"updates: {ENDLESS}" in text
    config.write_text(text.replace(f"updates: {ENDLESS}", f"updates: {updates}"))
    (run.folder / manifest.MANIFEST).unlink()
    run.start().end()


def _at_work(run: Run, victim: psutil.Process) -> bool:
    """Two workers that are past their start, none of them the killed one."""
    titles = []
    for one in run.actors(WORKER):
        try:
            titles += [" ".join(one.cmdline())] if one.pid != victim.pid else []
        except psutil.Error:
            continue
    return len(titles) == 2 and not any("__init__" in title for title in titles)


def driver_kills(folder: Path, checkpoint: Path, whole: Run, points: int) -> dict[str, Any]:
    """As many runs, each killed (SIGKILL) at a random point and resumed; how many ended bit for bit as ``whole``."""
    chance, seconds, at = random.Random(1), [], []
    for number in range(points):
        run = Run(folder / f"run-{number}", checkpoint, "tracking.enabled=false").start()
        with running(run):
            run.reach(chance.randint(1, UPDATES - 1))
            time.sleep(chance.random() * 0.2)
            run.signal(signal.SIGKILL)
            run.end(-signal.SIGKILL)
            assert diagnose(run.folder).state == "killed"
            at.append(run.steps()[-1])
            seconds.append(run.start().end())
        assert_undisturbed(run, whole)
    return {"points": points, "killed after update": at, "bit-equal": points, "seconds of the rest": seconds}


def seconds_to_leave(folder: Path, checkpoint: Path, mode: str, times: int) -> dict[str, Any]:
    """SIGTERM in the midst of training: seconds to exit code 0, with nothing left; it is resumed and asked again."""
    run = Run(folder / "run", checkpoint, f"improve.mode={mode}", "improve.checkpoint_every=1000", updates=ENDLESS)
    chance, seconds = random.Random(2), []
    with running(run):
        for _ in range(times):
            run.start().reach(max([0, *run.steps()]) + chance.randint(2, 6))
            run.signal(signal.SIGTERM)
            seconds.append(run.end(0))
            assert diagnose(run.folder).state == "stopped"
        finish_at(run, run.steps()[-1] + 2)
    assert_whole(run, run.steps()[-1])
    return {"mode": mode, "seconds": seconds}


def seconds_from_exception(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """A reward function that raises ends the run: seconds from the error to the process's end, with nothing left."""
    run = Run(folder / "run", checkpoint, *paced(folder, 0, "fails")).start()
    with running(run):
        run.end(1)
        left = time.time()
    failed = next(event for event in read_events(run.folder) if event["kind"] == "failed")
    return {"seconds": [left - float(failed["time"])], "error": failed["text"]}


def stopped_worker(folder: Path, checkpoint: Path, timeout: float) -> dict[str, Any]:
    """SIGSTOP to a worker: seconds until it was noticed as silent and replaced."""
    run = Run(
        folder / "run", checkpoint, *paced(folder, 0.02), f"cluster.worker_timeout_seconds={timeout}", updates=ENDLESS
    ).start()
    with running(run):
        run.reach(3)
        victim = run.actors(WORKER)[0]
        victim.suspend()
        stopped = time.monotonic()
        _until(lambda: _at_work(run, victim) and not victim.is_running(), 600, run)
        seconds = time.monotonic() - stopped
        run.signal(signal.SIGTERM)
        run.end(0)
    lost = [event for event in read_events(run.folder) if event["kind"] == "worker_lost"]
    assert lost and "has not answered" in lost[0]["text"], lost
    assert_whole(run, run.steps()[-1])
    return {"timeout": timeout, "seconds": [seconds], "said": lost[0]["text"]}


def store_away(folder: Path, checkpoint: Path, updates: int) -> dict[str, Any]:
    """An MLflow server is stopped after a third of a run and started again after two; every metric must be there once
    afterwards.

    Step times with the server there, away, and back; and of a run that tracks nothing.
    """
    with server(folder) as place:
        settings = [*paced(folder, 0.02), f"tracking.uri=http://127.0.0.1:{place.port}"]
        run = Run(folder / "run", checkpoint, *settings, updates=updates).start()
        with running(run):
            run.reach(updates // 3)
            place.stop()
            run.reach(2 * updates // 3)
            place.start()
            run.end()
        there = complete(run, place.port)
        needed = "" if there else "sync"
        if not there:
            assert sync(run.folder, print)
        assert complete(run, place.port), "metrics are missing or doubled"
        status = _answer(place.port, f"runs/get?run_id={_id(run)}")["run"]["info"]["status"]
    bare = Run(folder / "bare", checkpoint, *paced(folder, 0.02), "tracking.enabled=false", updates=updates).start()
    with running(bare):
        bare.end()
    thirds = [record["seconds_update_total"] for record in run.metrics()]
    third = updates // 3
    return {
        "updates": updates,
        "status": status,
        "needed besides": needed,
        "seconds a step": {
            "server there": statistics.median(thirds[2:third]),
            "server away": statistics.median(thirds[third : 2 * third]),
            "server back": statistics.median(thirds[2 * third :]),
            "no tracking": statistics.median([record["seconds_update_total"] for record in bare.metrics()][2:]),
        },
    }


def complete(run: Run, port: int) -> bool:
    """Whether each metric of each step of ``metrics.jsonl`` is in the store, once, with its value."""
    logged = run.metrics()
    names = {name for record in logged for name, value in record.items() if isinstance(value, float | int)} - {
        "step",
        "time",
    }
    for name in names:
        answer = _answer(port, f"metrics/get-history?run_id={_id(run)}&metric_key={name}&max_results=100000")
        found = [(int(one["step"]), float(one["value"])) for one in answer.get("metrics", [])]
        if sorted(found) != [
            (record["step"], float(record[name])) for record in logged if record.get(name) is not None
        ]:
            return False
    return True


def _id(run: Run) -> str:
    return str((read_record(run.folder) or {"runs": {}})["runs"].get("improve", ""))


def _answer(port: int, question: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/2.0/mlflow/{question}", timeout=30) as reply:
        found: dict[str, Any] = json.load(reply)
        return found


class Server:
    """An MLflow server of our own, on a free port and a sqlite file in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, None
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port: int = one.getsockname()[1]

    def start(self) -> None:
        """Until it answers."""
        store = f"sqlite:///{self.folder / 'mlflow.db'}"
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", store, "--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("a") as log:
            self.process = psutil.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
            )
        _until(self._answers, 600)

    def stop(self) -> None:
        """All its processes, at once."""
        assert self.process is not None
        family = [self.process, *self.process.children(recursive=True)]
        for one in family:
            one.kill()
        psutil.wait_procs(family, timeout=30)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """One that is up, and gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    one = Server(folder)
    one.start()
    try:
        yield one
    finally:
        one.stop()


def _until(reached: Any, seconds: float, run: Run | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, run.words() if run is not None else "not in time"
        time.sleep(0.05)
