"""``latent-control watch`` against its bars: the first curve, a search, and what following costs.

    python benchmarks/watch.py RUN            a finished run with a replay buffer, whose log is written again

Prints JSON: ``first_curve_seconds`` from the first update's line to its curve at the client; ``core_share`` of the
server while 50 updates a second are logged and one page listens; ``search_seconds`` of a regular expression over
``searched`` rollouts, answered by HTTP; ``counterfactual_seconds`` on demand, of a rollout of training and of a
held-out answer: the first, ``LOOKED`` seconds after the list of rollouts was opened and the model began to load, and
the median of the next ones, which differ.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import psutil
from common import machine

from pipeline.replay.following import KEPT
from pipeline.replay.search import RolloutSearch
from pipeline.runs.layout import CONFIG, METRICS, REPLAY
from pipeline.runs.metrics_log import records
from pipeline.runs.stage_table import IMPROVE
from pipeline.storage import checksummed_jsonl
from pipeline.watch.followed_run import FollowedRun

RATE, SECONDS, ASKED, LOOKED, PATTERN = 50, 30, 6, 5, r"(\d+ [+*-] )+\d+ = 3\d"


def events(address: str) -> Iterator[tuple[str, str]]:
    """(name, data) of each event of a stream."""
    with urllib.request.urlopen(address, timeout=60) as reply:
        name = ""
        for line in reply:
            text = line.decode().rstrip("\n")
            if text.startswith("event: "):
                name = text.removeprefix("event: ")
            elif text.startswith("data: "):
                yield name, text.removeprefix("data: ")


def first_curve(stream: Iterator[tuple[str, str]], log: Path, lines: list[str]) -> float:
    """Seconds from the second line, a curve's least, to the event that holds it."""
    began = time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        file.writelines(lines)
    while True:
        name, data = next(stream)
        if name == "curves" and "reward" in data:
            return time.perf_counter() - began


def core_share(process: psutil.Process, log: Path, lines: list[str]) -> float:
    """Processor seconds per second while ``RATE`` lines a second are written."""
    before, began = sum(process.cpu_times()[:2]), time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        for number, line in enumerate(lines):
            file.write(line)
            file.flush()
            time.sleep(max(0.0, began + (number + 1) / RATE - time.perf_counter()))
    return (sum(process.cpu_times()[:2]) - before) / (time.perf_counter() - began)


def search_seconds(address: str) -> tuple[float, int]:
    """(the median of five answers, the rollouts that were searched)."""
    taken, searched = [], 0
    for _ in range(5):
        began = time.perf_counter()
        with urllib.request.urlopen(f"{address}?{urlencode({'text': PATTERN, 'regex': 1})}", timeout=60) as reply:
            searched = json.load(reply)["searched"]
        taken.append(time.perf_counter() - began)
    return sorted(taken)[2], searched


def counterfactual_seconds(run: Path) -> dict[str, float]:
    """Of ``run`` itself, in seconds."""
    followed = FollowedRun(run)
    followed.poll()
    rollouts = [row["rollout_id"] for row in followed.found(RolloutSearch(), 0)["rows"]][:ASKED]
    answers = [row["rollout_id"] for row in followed.found(RolloutSearch(finish="greedy"), 0, "improved")["rows"]][
        :ASKED
    ]
    threading.Thread(target=followed.model.ask, args=("model", b""), daemon=True).start()  # as the page does
    time.sleep(LOOKED)
    taken = []
    for one in (*rollouts, *answers):
        began = time.perf_counter()
        followed.explained(one)
        taken.append(time.perf_counter() - began)
    followed.close()
    return {
        "counterfactual_seconds_first": taken[0],
        "counterfactual_seconds": statistics.median(taken[1 : len(rollouts)]),
        "counterfactual_seconds_heldout": statistics.median(taken[len(rollouts) :]),
    }


def measured(run: Path, folder: Path) -> dict[str, float]:
    """All three, on a copy of ``run`` whose log begins empty."""
    shutil.copy(run / CONFIG, folder / CONFIG)
    shutil.copytree(run / REPLAY, folder / REPLAY)
    updates = [record for record in records(run / METRICS) if record["stage"] == IMPROVE]
    lines = [
        checksummed_jsonl.line(dict(updates[step % len(updates)]) | {"step": step + 1})
        for step in range(RATE * SECONDS)
    ]
    (folder / METRICS).touch()
    words = [sys.executable, "-m", "pipeline", "watch", str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        link = re.search(r"http://\S+", process.stdout.readline())
        assert link is not None
        api = f"{link[0]}api/runs/{folder.name}"
        stream = events(f"{api}/events")
        first = first_curve(stream, folder / METRICS, lines[:2])
        threading.Thread(target=lambda: [None for _ in stream], daemon=True).start()
        share = core_share(psutil.Process(process.pid), folder / METRICS, lines[2:])
        seconds, searched = search_seconds(f"{api}/rollouts")
        process.terminate()
        process.wait()
    found = {"first_curve_seconds": first, "core_share": share, "search_seconds": seconds, "searched": searched}
    return found | counterfactual_seconds(run)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run with a replay buffer")
    with tempfile.TemporaryDirectory() as folder:
        found = measured(parser.parse_args().run, Path(folder))
    print(json.dumps({"machine": machine(), "rollouts_kept": KEPT, **found}, indent=2))


if __name__ == "__main__":
    main()
