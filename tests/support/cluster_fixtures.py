"""Several Ray nodes on this machine. Test modules name this in ``pytest_plugins``."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _as_in_a_script() -> None:
    """What a shell starts with ``&`` in a batch script ignores SIGINT, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class LocalCluster:
    """Ray nodes on this machine, each with processes of its own under one ``ray start --block``, in a folder of their
    own."""

    def __init__(self, folder: Path) -> None:
        # Its own folder: the one in common is where other clusters of this machine leave their address for "auto".
        self.environment = os.environ | {
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.environment = {
            k: v for k, v in self.environment.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
        }
        self.port, self.dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self.nodes: list[psutil.Process] = []
        self.folder, self.started = folder, 0
        self.log = (folder / "nodes.log").open("w")

    def head(self, cpus: int) -> None:
        dashboard = ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.dashboard)]
        self._start(
            "--head", "--port", str(self.port), *dashboard, "--ray-client-server-port", str(free_port()), cpus=cpus
        )
        deadline = time.monotonic() + 240
        while True:  # its port is open some time before it answers
            try:
                with urllib.request.urlopen(f"{self.address}/api/version", timeout=5):
                    return
            except OSError:
                assert time.monotonic() < deadline and self.nodes[0].is_running(), "the head did not start"
                time.sleep(0.5)

    def join(self, cpus: int) -> psutil.Process:
        return self._start("--address", f"127.0.0.1:{self.port}", cpus=cpus)

    def _start(self, *arguments: str, cpus: int) -> psutil.Process:
        ports = ["--dashboard-agent-listen-port", str(free_port()), "--min-worker-port", "0", "--max-worker-port", "0"]
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            "--num-cpus",
            str(cpus),
            "--num-gpus",
            "0",
        ]
        # Nodes that share a folder clear away each other's unpacked jobs.
        command += ["--temp-dir", str(self.folder / str(self.started))]
        self.started += 1
        command += [*arguments, *ports, "--object-store-memory", str(10**8), "--disable-usage-stats"]
        self.nodes.append(
            psutil.Popen(command, env=self.environment, stdout=self.log, stderr=self.log, preexec_fn=_as_in_a_script)
        )
        return self.nodes[-1]

    def kill(self, node: psutil.Process) -> None:
        """As when a machine fails: all of its processes at once."""
        self.nodes.remove(node)
        family = [node, *node.children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=10)

    def stop(self) -> None:
        for node in reversed(list(self.nodes)):
            self.kill(node)
        self.log.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head and two nodes of one CPU each."""
    # sockets: short paths only
    with tempfile.TemporaryDirectory(prefix="lc", dir="/tmp", ignore_cleanup_errors=True) as folder:
        local = LocalCluster(Path(folder))
        try:
            local.head(1)
            local.join(1)
            local.join(1)
            yield local
        finally:
            local.stop()
