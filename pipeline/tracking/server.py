"""``latent-control ui``: a light MLflow server on the store of a run, on this machine only, with links to the
charts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from configs.paths import nothing_at
from pipeline.runs.layout import MLFLOW
from pipeline.runs.stage_table import ACTIONS, ONLINE
from pipeline.tracking.uris import read_record

HOST = "127.0.0.1"
FIRST_PORT = 5000
START_SECONDS = 120.0
CHART = "workflowType=machine_learning&compareRunsMode=CHART"
OVERLAID = (*ONLINE, ACTIONS)
"""Stages whose curves are worth laying over those of other runs."""
# 0.5 GB and 5 s to start instead of 2 GB and a minute.
LIGHT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@dataclass(frozen=True, kw_only=True)
class Store:
    """Where runs are tracked, e.g. ``Store(uri="sqlite:////home/me/runs/mlflow.db", experiment_id="1", runs={"clone":
    "4f..."})``."""

    uri: str
    experiment_id: str | None = None
    """None: the server is asked which experiments there are."""
    runs: dict[str, str] = field(default_factory=dict)
    """MLflow run id of each stage."""


def find_store(target: str) -> Store:
    """The store behind a run folder, a folder of runs, a database file or a URI.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there is no store.
    """
    if "://" in target:
        return Store(uri=target)
    path = Path(target).absolute()
    if not path.exists():
        raise FileNotFoundError(nothing_at(path))
    if path.is_file():
        return Store(uri=f"sqlite:///{path}")
    if known := read_record(path):
        return Store(uri=known["tracking_uri"], experiment_id=str(known["experiment_id"]), runs=known["runs"])
    if (path / "mlflow.db").is_file():
        return Store(uri=f"sqlite:///{path / 'mlflow.db'}")
    raise ValueError(
        f"{path} has no {MLFLOW} (a run with tracking.enabled) and no mlflow.db (a folder of runs); give one of "
        "those or a store URI"
    )


def choose_port(wanted: int | None) -> int:
    """``wanted`` if it is free; by default 5000 or the next free port.

    Raises:
        ValueError: ``wanted`` is taken; the message names a free one.
    """
    start = FIRST_PORT if wanted is None else wanted
    free = next((port for port in range(start, min(start + 100, 65536)) if _is_free(port)), None)
    if free is None or (wanted is not None and free != wanted):
        raise ValueError(
            f"port {start} is "
            "taken" + (f"; --port {free} is free" if free else ", and so are those after it; give another --port")
        )
    return free


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def chart_link(experiment_id: str, address: str, tags: Mapping[str, str] | None = None) -> str:
    """Address of an experiment's charts; with ``tags``, only of the runs that have them all."""
    link = f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs?{CHART}"
    wanted = " and ".join(f"tags.{name} = {json.dumps(value)}" for name, value in (tags or {}).items())
    return f"{link}&searchFilter={quote(wanted)}" if wanted else link


def deep_link(experiment_id: str, *, server: str = f"http://{HOST}:{FIRST_PORT}", group: str | None = None) -> str:
    """Address of the experiment's chart page (MLflow's start page shows none of it), one group's runs only if given."""
    return chart_link(experiment_id, server, {} if group is None else {"group": group})


def compare_link(experiment_id: str, run_ids: Sequence[str], address: str) -> str:
    """Address of MLflow's page that sets runs side by side."""
    runs, experiments = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), [experiment_id]))
    return f"{address.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}"


def links(address: str, store: Store, experiments: dict[str, str]) -> list[str]:
    """Deep links: the charts of each experiment ({id: name}) and of each stage over all its runs, then the run of each
    stage."""
    base = address.rstrip("/")
    lines = [f"charts of {name}: {chart_link(number, base)}" for number, name in experiments.items()]
    if store.experiment_id is None:
        return lines
    same = [stage for stage in store.runs if stage in OVERLAID]
    overlaid = [f"{stage} of all runs: {chart_link(store.experiment_id, base, {'stage': stage})}" for stage in same]
    own = [f"stage {stage}: {base}/#/experiments/{store.experiment_id}/runs/{run}" for stage, run in store.runs.items()]
    return [*lines, *overlaid, *own]


def serve(store: Store, port: int, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C, SIGTERM or SIGHUP. For a store that is a server only the links are printed.

    Raises:
        ValueError: the server does not start; with its last line of output.
    """
    if store.uri.startswith(("http://", "https://")):
        _announce(store.uri, store, say)
        return
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        store.uri,
        "--host",
        HOST,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    # A separate session: Ctrl-C reaches this process only, which ends the server with its workers.
    with subprocess.Popen(
        command,
        env=os.environ | LIGHT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as server:
        try:
            address = f"http://{HOST}:{port}"
            _wait_until_up(address, server)
            _announce(address, store, say)
            say("stop with Ctrl-C")
            assert server.stdout is not None
            for _ in server.stdout:  # read on, or the server blocks on a full pipe
                pass
        except KeyboardInterrupt:
            say("stopped")
        finally:
            _end(server)


def _wait_until_up(address: str, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            words = (server.stdout.read() if server.stdout else "").strip().splitlines()
            raise ValueError(
                f"the MLflow server ended with code {server.returncode}: {words[-1] if words else 'no output'}"
            )
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise ValueError(f"the MLflow server did not answer within {START_SECONDS:.0f} s")


def _end(server: subprocess.Popen[str]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(5)  # less than a scheduler's patience with us
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _announce(address: str, store: Store, say: Callable[[str], None]) -> None:
    if store.experiment_id is not None:
        found = {store.experiment_id: "this run"}
    else:
        from pipeline.tracking.mlflow_store import experiments

        found = experiments(address)
    for line in links(address, store, found):
        say(line)
    if not found:
        say(f"no experiments in {store.uri} yet: {address}")
