"""Command ``watch``. Nothing heavy is imported before it runs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE
from pipeline.cli.output import echo
from pipeline.cli.session import existing, exit_on_error
from pipeline.cli.shell_completion import run_folders
from pipeline.runs.layout import CONFIG

LOOPBACK = "127.0.0.1"


@app.command()
def watch(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|FOLDER",
            help="A run folder, at work or finished, or a folder of runs.",
            autocompletion=run_folders,
        ),
    ],
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Default: 8080, or the next free one.")
    ] = None,
) -> None:
    """Watch RUN while it works: curves, rollouts and where time goes, on a local page that only its printed link
    opens."""
    with exit_on_error(USAGE):
        folder = existing(target)
        if not (folder / CONFIG).is_file() and not any(folder.glob(f"*/{CONFIG}")):
            raise ValueError(
                f"{folder} is neither a run folder nor a folder of runs: no {CONFIG} lies in it or below it"
            )
        from pipeline.evaluation.statistics import student
        from pipeline.watch.followed_run import FollowedRuns
        from pipeline.watch.web import application
        from pipeline.web.guard import new_token
        from pipeline.web.server import listen, serve

        student(1)  # imports scipy, which the first curve should not wait for
        listener, token, ending = listen(LOOPBACK, port), new_token(), threading.Event()
    with exit_on_error(FAILED), listener:
        page = application(FollowedRuns(folder), LOOPBACK, token, ending)
        serve("watch page", page, listener, token, echo, ending)
