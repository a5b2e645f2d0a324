"""A private Ray that does not start within Ray's half minute."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import psutil
import pytest
import ray

from pipeline.cluster.connect import SLOW, STARTS, joined
from pipeline.runs.errors import RunError


def test_no_process_of_a_failed_start_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven failed starts of one run once left seven heads, and those made the next start slower still. What was there
    before is not touched."""
    program = [sys.executable, "-c", "import time; time.sleep(600)"]
    other, left = subprocess.Popen(program), list[psutil.Process]()

    def starts(**_: Any) -> None:
        left.append(psutil.Process(subprocess.Popen(program).pid))
        raise Exception(f"The current node {SLOW}. This could happen because the GCS has become overloaded.")

    monkeypatch.setattr(ray, "init", starts)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test's Ray may be at work in this process
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    try:
        with pytest.raises(RunError, match="overloaded"), joined("local", 1):
            pass
        gone, alive = psutil.wait_procs(left, timeout=10)
        assert len(gone) == STARTS and not alive and other.poll() is None
    finally:
        other.kill()
