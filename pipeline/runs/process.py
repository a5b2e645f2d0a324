"""Which process works on a run: one at a time, known by more than its number, which the system gives out again."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipeline.runs.errors import AtWorkError
from pipeline.runs.layout import LOCK, METRICS, PROCESS
from pipeline.storage.atomic import write_atomic
from pipeline.storage.locks import locked

SILENT_SECONDS = 600.0
"""A run on another machine that has logged nothing for this long counts as interrupted."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def at_work(run_dir: Path) -> Iterator[None]:
    """Keep ``run_dir`` to this process for a block, and record there which process that is.

    Raises:
        AtWorkError: another one works on it.
    """
    with locked(run_dir / LOCK, wait=False) as free:
        other = read_process(run_dir)
        # The lock alone decides where there are locks: its holder is alive, whatever the record says.
        if free is False or (free is None and other and is_alive(other, _modified(run_dir / METRICS))):
            raise AtWorkError(f"{run_dir} is at work: {_named(other)} holds it; wait until it ends, or end it")
        about = {"host": socket.gethostname(), "pid": os.getpid(), "birth": _birth(os.getpid()), "started": time.time()}
        write_atomic(run_dir / PROCESS, json.dumps(about).encode())
        try:
            yield
        finally:
            (run_dir / PROCESS).unlink(missing_ok=True)


def at_work_elsewhere(run_dir: Path) -> str:
    """Why nothing can be started on a run now; "" where it is free."""
    if not (run_dir / LOCK).is_file():
        return ""
    try:
        with locked(run_dir / LOCK, wait=False) as free:
            return "" if free is not False else f"{run_dir} is at work: {_named(read_process(run_dir))} holds it"
    except OSError:
        return ""


def read_process(run_dir: Path) -> dict[str, Any]:
    """The record of the process that works on a run, or was killed while it did; empty without one."""
    try:
        found = json.loads((run_dir / PROCESS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    wanted = {"host": str, "pid": int, "started": int | float}
    whole = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in wanted.items())
    return found if whole else {}


def is_alive(record: Mapping[str, Any], last_sign: float) -> bool:
    """Whether the recorded process, and no other that has its number now, is there; of another machine: whether the
    run has logged something lately (``last_sign``: when it last did, seconds since 1970)."""
    if record["host"] == socket.gethostname():
        return _is_this(record)
    return time.time() - max(last_sign, record["started"]) < SILENT_SECONDS


def _is_this(record: Mapping[str, Any]) -> bool:
    try:
        process = psutil.Process(record["pid"])
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        if "birth" in record:
            return bool(_birth(record["pid"]) == record["birth"])
        return process.create_time() <= record["started"] + 1.0  # of versions before this
    except (psutil.Error, OSError, ValueError, OverflowError):
        return False


def _birth(pid: int) -> str:
    """What no other process has, also after a restart of the machine: its boot, and the clock ticks from there to the
    process's start."""
    if not _BOOT.is_file():
        return str(psutil.Process(pid).create_time())
    ticks = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return f"{_BOOT.read_text().strip()}/{ticks}"


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() else 0.0


def _named(record: Mapping[str, Any]) -> str:
    return f"process {record['pid']} on {record['host']}" if record else "another process"
