"""Commands ``export`` and ``serve``. Nothing heavy is imported before one runs."""

from __future__ import annotations

import json
import signal
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from pipeline import cli

LOOPBACK = ("127.0.0.1", "localhost", "::1")
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


@cli.app.command()
def serve(
    target: Annotated[Path, typer.Argument(metavar="EXPORT_OR_RUN", help="A folder made by export, or a run: it is exported first.")],
    host: Annotated[str, typer.Option("--host", help="127.0.0.1: this machine only; 0.0.0.0: everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Copies of the model, each in its own process.")] = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
) -> None:
    """OpenAI-style completions by Ray Serve, codes in the reply; codes or a mask of them may be forced by the caller. Ends with Ctrl-C."""
    folder = target.absolute()
    with cli.sentences(cli.USAGE):
        cli._existing(folder)
        from pipeline import export as exporting

        exporting.require_serve()
        exporting.require_free(host, port)
        if (folder / cli.RUN_CONFIG).is_file():
            folder = folder / "export"
            with redirect_stdout(sys.stderr):
                exporting.export(target.absolute(), folder)
        exporting.require_whole(folder)
    from pipeline.serve import serving

    with cli.sentences(cli.FAILED), serving(folder, host=host, port=port, replicas=replicas, dtype=dtype, device=device) as address:
        reach = "" if host in LOOPBACK else " (anybody who reaches this machine can use it: there is no password)"
        typer.echo(f"serving {folder.name} at {address}/v1{reach}; Ctrl-C ends it")
        typer.echo(f"""try: curl {address}/v1/completions -H 'Content-Type: application/json' -d '{{"prompt": "...", "max_tokens": 16}}'""")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a container's end is an end, too
        threading.Event().wait()
