"""Commands ``doctor`` and ``ui``. Nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE, AsJson, Overrides
from pipeline.cli.output import echo, print_json
from pipeline.cli.session import Prospect, checked, exit_on_error, prospect


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also say how long the run of this config takes here.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """List what is installed, what is missing, and the command that installs it."""
    from pipeline.preflight import doctor as examination

    findings = examination.examine()
    with exit_on_error(USAGE):
        told = Prospect() if config is None else prospect(checked(config, overrides or [], also=[]))
    if as_json:
        print_json(examination.as_data(findings) | {"number_types": told.types, "seconds": told.seconds})
    else:
        echo("\n".join([examination.as_text(findings), *told.lines]))
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
