"""Stages, commands, tracking: the driver's side of a run. ``open_run`` reads one in Python."""

from __future__ import annotations

import gc
import os
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.runs.open_run import Run

# MLflow asks for it when it is imported; a container's user with no entry and no HOME has none.
if os.path.expanduser("~") == "~":
    os.environ["HOME"] = tempfile.gettempdir()

# Read when torch is loaded. Its threads would otherwise wait for each other by spinning, which on a busy machine makes
# an update 30 times slower: two threads need both cores at the same instant.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

gc.set_threshold(50_000)  # as in rollout_workers

__all__ = ["open_run"]


def open_run(folder: str | Path) -> Run:
    """The run in ``folder``: config, metrics, rollouts, checkpoints, models (docs/notebook.md).

    Raises:
        ValueError: it is not a run folder.
    """
    from pipeline.runs.open_run import Run

    return Run(folder)
