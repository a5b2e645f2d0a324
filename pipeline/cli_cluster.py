"""Commands for clusters: ``submit`` and, inside the job it starts, ``job``. Nothing heavy is imported before one runs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from pipeline import cli


@cli.app.command()
def submit(
    config: cli.ConfigFile,
    overrides: cli.Overrides = None,
    address: Annotated[str, typer.Option("--address", help="The cluster's dashboard.")] = "http://127.0.0.1:8265",
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="On storage that all nodes share. One that holds a run: go on.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end, or leave it running.")] = True,
) -> None:
    """Run CONFIG as a Ray job on a cluster: resources checked first, log followed, exit code passed on; Ctrl-C stops the job."""
    with cli.sentences(cli.USAGE):
        if run_dir is None:
            raise ValueError("--run-dir is missing: a job writes on the cluster, so name a folder on storage that all its nodes share")
        settings = cli.checked(config, [*(overrides or []), "cluster.address=auto"], also=[])
        from pipeline import jobs

        client = jobs.client_of(address)
        if problems := jobs.misfits(jobs.nodes_of(address), jobs.bundles(settings)):
            raise ValueError("; ".join(problems))
    for end in (signal.SIGINT, signal.SIGTERM):  # a shell that starts this in the background has switched Ctrl-C off
        signal.signal(end, signal.default_int_handler)
    with cli.sentences(cli.FAILED):
        job = jobs.submit(client, settings, run_dir.absolute())
        typer.echo(f"{job} runs in {run_dir.absolute()}; dashboard: {address}/#/jobs/{job}")
        if not wait:
            typer.echo(f"follow it: ray job logs --address {address} --follow {job}; end it: ray job stop --address {address} {job}")
            return
        try:
            code = jobs.follow(client, job, typer.echo)
        except KeyboardInterrupt:
            ended = jobs.stop(client, job)
            how = "stopped" if ended else "asked to stop, but still ending"
            typer.echo(f"\n{job} is {how}; go on with the same command", err=True)
            raise typer.Exit(cli.INTERRUPTED) from None
    raise typer.Exit(code)


@cli.app.command(hidden=True)
def job(config: cli.ConfigFile, run_dir: Annotated[Path, typer.Option("--run-dir")]) -> None:
    """What ``submit`` starts on the cluster: a run, or the rest of one that RUN_DIR holds."""
    if (run_dir / cli.RUN_CONFIG).is_file():
        cli.resume(run_dir)
    else:
        cli.run(config, None, run_dir)
