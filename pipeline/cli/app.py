"""The command line, ``latent-control``: the Typer app that every command joins.

Exit codes: 0 done; 1 failed while working; 2 wrong config or usage, nothing was started; 3 done, but a gate of the
config failed (docs/evaluation.md); 130 interrupted.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipeline.cli.options import DEBUG, EXIT_CODES

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich", epilog=EXIT_CODES)

bank_app = typer.Typer(no_args_is_help=True, help="Many small policies on one base LM and codebook: train, serve.")
app.add_typer(bank_app, name="bank")


def _say_version(wanted: bool) -> None:
    if wanted:
        from pipeline.console.json_display import own_version

        typer.echo(f"latent-control {own_version()}")
        raise typer.Exit


@app.callback()
def latent_control(
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks (also by {DEBUG}=1).")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version.")
    ] = False,
) -> None:
    """Teach a language model latent actions, then improve it by reinforcement learning over them.

    Begin with: latent-control run quickstart
    """
    if debug:
        os.environ[DEBUG] = "1"
