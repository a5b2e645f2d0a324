"""Names the full disk when a write failed."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

LEAST = 256 * 2**20
"""Bytes without which no run is started."""
SCARCE = 0.02
"""Free share of a disk below which it counts as full."""


def folder_problems(folder: Path, option: str) -> Iterator[str]:
    """Why a run cannot write to ``folder``, which need not be there yet, or to the folder of temporary files."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    for place, remedy in ((there, f"give another folder ({option})"), (Path(tempfile.gettempdir()), "set TMPDIR")):
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            yield f"{option}: {place} cannot be written ({(error.strerror or str(error)).lower()}); {remedy}"
            continue
        if (free := shutil.disk_usage(place).free) < LEAST:
            yield f"{option}: {free / 2**20:,.0f} MiB are free on the disk of {place}; make room, or {remedy}"


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
