"""Samples of the machine a run's driver is on, under the names that MLflow's own monitor gives them."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping

import psutil

_MB = 1e6
_GPU = "utilization.gpu,memory.used,memory.total,power.draw"


class Sampler(threading.Thread):
    """Gives ``take`` a sample every ``seconds``, the first one after that time, until ``end``."""

    def __init__(self, seconds: float, take: Callable[[Mapping[str, float]], None]) -> None:
        super().__init__(name="system-metrics", daemon=True)
        self._seconds, self._take = seconds, take
        self._ended = threading.Event()
        self._network = psutil.net_io_counters()

    def run(self) -> None:
        """The thread."""
        psutil.cpu_percent()  # counts from here on
        while not self._ended.wait(self._seconds):
            self._take(self.sample())

    def end(self) -> None:
        """No sample after this."""
        self._ended.set()
        self.join(10)

    def sample(self) -> dict[str, float]:
        """``{"cpu_utilization_percentage": 93.1, "system_memory_usage_megabytes": 5120.3, ...}``; rates are since the
        last sample."""
        memory, disk = psutil.virtual_memory(), shutil.disk_usage("/")
        network, self._network = self._network, psutil.net_io_counters()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.used / disk.total * 100,
            "disk_usage_megabytes": disk.used / _MB,
            "disk_available_megabytes": disk.free / _MB,
            "network_receive_megabytes": (self._network.bytes_recv - network.bytes_recv) / _MB,
            "network_transmit_megabytes": (self._network.bytes_sent - network.bytes_sent) / _MB,
        }
        return {name: round(value, 1) for name, value in (found | gpus()).items()}


def gpus() -> dict[str, float]:
    """Metrics of each NVIDIA GPU from ``nvidia-smi``; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={_GPU}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {name: value for number, line in enumerate(lines) for name, value in gpu(number, line).items()}


def gpu(number: int, line: str) -> dict[str, float]:
    """Metrics of a line of ``nvidia-smi`` without unknown values ("[N/A]"). ``gpu(0, "87, 1024, 4096, 210.5")``."""
    parts = [part.strip() for part in line.split(",")]
    known = [float(part) if part.replace(".", "", 1).isdecimal() else None for part in parts] + [None] * 4
    busy, used, total, power = known[:4]
    found = {
        f"gpu_{number}_utilization_percentage": busy,
        f"gpu_{number}_memory_usage_megabytes": None if used is None else used * 2**20 / _MB,
        f"gpu_{number}_memory_usage_percentage": 100 * used / total if used is not None and total else None,
        f"gpu_{number}_power_usage_watts": power,
    }
    return {name: value for name, value in found.items() if value is not None}
