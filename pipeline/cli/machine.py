"""Commands ``doctor`` and ``ui``. Nothing heavy is imported before one runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE, AsJson
from pipeline.cli.output import echo, print_json
from pipeline.cli.session import exit_on_error


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """List what is installed, what is missing, and the command that installs it."""
    from pipeline.preflight import doctor as examination

    findings = examination.examine()
    if as_json:
        print_json(examination.as_data(findings))
    else:
        echo(examination.as_text(findings))
    raise typer.Exit(0 if examination.is_fine(findings) else FAILED)


@app.command()
def ui(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A run folder, a folder of runs, an mlflow.db file or a store URI.")
    ],
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Default: 5000, or the next free one.")
    ] = None,
) -> None:
    """Start an MLflow server on a run's store and print the links; stops with Ctrl-C."""
    from pipeline.tracking import server

    with exit_on_error(USAGE):
        store = server.find_store(target)
        chosen = server.choose_port(port)
    with exit_on_error(FAILED):
        server.serve(store, chosen, echo)
