"""Names the full disk when a write failed."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path

SCARCE = 0.02
"""Free share of a disk below which it counts as full."""


def is_full(error: BaseException) -> bool:
    """Whether an error, or a worker's error inside of it, reports a full disk or quota."""
    cause = getattr(error, "cause", None) or error
    return getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        words in str(cause) for words in ("No space left on device", "os error 28", "Disk quota exceeded")
    )


def full(run_dir: Path) -> str:
    """``the disk of /runs/first is full (0.1 of 900.0 MiB left): ...``. Checks the run's disk and Ray's."""
    said = []
    for folder in (run_dir, Path(tempfile.gettempdir())):
        usage = shutil.disk_usage(folder)
        if usage.free < SCARCE * usage.total:
            said.append(
                f"the disk of {folder} is full ({usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB left)"
            )
    besides = f"of {run_dir} or of what the run writes besides (tracking.uri, {tempfile.gettempdir()})"
    place = "; ".join(said) or f"a disk or a quota is full, {besides}"
    return f"{place}: nothing is lost; make room"
