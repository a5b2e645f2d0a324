"""The folder that a job's driver works in: a copy of Ray's, which a start of another node may delete."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

COPY = "LATENT_CONTROL_JOB_FOLDER"
RAYS = "runtime_resources"
"""Part of the path of every folder that Ray unpacks a job into."""


def own_folder() -> None:
    """In a folder of Ray's, begin this process again in a copy of it: code and files are read as late as they are
    needed. The copy goes with the process."""
    if copy := os.environ.pop(COPY, None):
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        return
    here = Path.cwd()
    if RAYS not in here.parts:
        return
    copy = tempfile.mkdtemp(prefix="latent-control-job-")
    shutil.copytree(here, copy, dirs_exist_ok=True)
    path = os.environ.get("PYTHONPATH", "").replace(str(here), copy)
    os.environ.update({COPY: copy, "PYTHONPATH": path})
    os.chdir(copy)
    os.execv(sys.executable, [sys.executable, "-m", "pipeline", *sys.argv[1:]])
