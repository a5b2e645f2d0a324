"""The installed program: the app with all its commands. ``pipeline.__main__`` alone imports this file."""

from __future__ import annotations

import signal
import sys

from pipeline.cli import (  # noqa: F401  (each file's commands join the app when it is imported)
    cluster,
    compare,
    config,
    evaluate,
    machine,
    pages,
    rewards,
    runs,
    search,
    serving,
    steer,
    tasks,
    train,
    tune,
)
from pipeline.cli.app import app
from pipeline.cli.panels import arrange
from pipeline.runs import interrupts

arrange(app)


def main() -> None:
    """Entry point of the installed program."""
    interrupts.end_on_signals()
    try:
        app(prog_name="latent-control")
    except KeyboardInterrupt as interrupt:
        sys.exit(interrupts.exit_code(getattr(interrupt, "number", signal.SIGINT), saved=False))
