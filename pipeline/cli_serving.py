"""Commands ``export`` and ``serve``. Nothing heavy is imported before one runs."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from pipeline import cli

Target = Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder (its last policy), or a checkpoint in one.")]


@cli.app.command()
def export(
    target: Target,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to make; default RUN/export.")] = None,
    register: Annotated[str | None, typer.Option("--register", help="Also an MLflow model of this name, in the run's store.")] = None,
    alias: Annotated[str | None, typer.Option("--alias", help="Of the registered version, e.g. champion.")] = None,
    tracking_uri: Annotated[str | None, typer.Option("--tracking-uri", help="Another store to register in.")] = None,
    as_json: cli.AsJson = False,
) -> None:
    """A folder for production, without the inverse dynamics model: AutoModelForCausalLM, serve and MLflow load it."""
    with cli.sentences(cli.USAGE):
        cli._existing(target.absolute())
        if alias and not register:
            raise ValueError(f"--alias {alias} is of a registered model: give --register NAME, too")
        from pipeline import export as exporting
        from pipeline.off_policy import checkpoint_of

        run_dir = checkpoint_of(target.absolute())[1]
        folder = (out or run_dir / "export").absolute()
        if folder.exists() and any(folder.iterdir()) and not (folder / exporting.PROVENANCE).is_file():
            raise ValueError(f"--out: {folder} is not empty and holds no export; give another folder")
    with cli.sentences(cli.FAILED), redirect_stdout(sys.stderr):
        info = exporting.export(target.absolute(), folder)
        model = exporting.registered(folder, run_dir, register, alias, tracking_uri) if register else {}
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "provenance": info, **model}, indent=2))
        return
    typer.echo(f"export: {folder} ({info['run']}, {info['stage']})")
    if model:
        typer.echo(f"registered: {model.get('alias') or model['model']} in {model['tracking_uri']}")
    typer.echo(f"serve it: latent-control serve {folder}")
