"""Commands ``submit``, ``job`` and ``scale``. Nothing heavy is imported before one runs."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import app as cli
from pipeline.runs.layout import stage_record
from pipeline.runs.stage_table import IMPROVE

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from configs.schema import RunConfig

RunDir = Annotated[
    Path, typer.Option("--run-dir", help="Folder of the run, on storage that all nodes of the cluster mount.")
]
JOINED = "cluster.address=auto"


@cli.app.command()
def submit(
    config: cli.ConfigFile,
    run_dir: RunDir,
    address: Annotated[str, typer.Option("--address", help="The head's dashboard, e.g. http://HEAD:8265.")],
    overrides: cli.Overrides = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log and exit as the job does.")] = True,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="The cluster adds nodes on demand: do not refuse what it has no room for.")
    ] = False,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="Submit it again so often when its driver is killed or lost.")
    ] = 0,
) -> None:
    """Run CONFIG as a job of a Ray cluster. Submitted again, it continues. Ctrl-C stops the job; its exit code is
    passed on."""
    with cli.sentences(cli.USAGE):
        settings, errors, warnings = _examined(config, [*(overrides or []), JOINED])
        if not run_dir.is_absolute():
            errors.append(
                f"--run-dir: {run_dir} is relative to a folder that only the driver has; give an absolute path"
            )
        if retries and not wait:
            errors.append("--retries: with --no-wait nobody is there to submit it again; leave one of them out")
        cli.report(config, errors, warnings)
        if settings is None or errors:
            raise typer.Exit(cli.USAGE)
        from pipeline.cluster import submit as jobs
        from pipeline.preflight import check as preflight

        with jobs.at(address) as client, jobs.staged(settings) as folder:
            scarce = preflight.cluster_problems(settings, jobs.node_resources(address))
            cli.report(config, [] if elastic else scarce, scarce if elastic else [])
            if scarce and not elastic:
                raise typer.Exit(cli.USAGE)
            job = _submitted(client, folder, run_dir, address)
            if wait:
                raise typer.Exit(
                    _followed(client, job, address, retries, lambda: _submitted(client, folder, run_dir, address))
                )


def _submitted(client: JobSubmissionClient, folder: Path, run_dir: Path, address: str) -> str:
    from pipeline.cluster import submit as jobs

    job = jobs.submit(client, folder, run_dir)
    typer.echo(f"submitted {job}; its log: ray job logs --follow --address {address} {job}", err=True)
    return job


def _followed(client: JobSubmissionClient, job: str, address: str, retries: int, again: Callable[[], str]) -> int:
    """The exit code of the job, or of the last that took its place after its driver was lost."""
    from pipeline.cluster import submit as jobs

    for end in (signal.SIGINT, signal.SIGTERM):  # a shell that starts this in the background has switched Ctrl-C off
        signal.signal(end, signal.default_int_handler)
    code = 1
    for number in range(retries + 1):
        code = jobs.follow(
            client, job, address, lambda text: typer.echo(text, nl=False), lambda text: typer.echo(text, err=True)
        )
        if number == retries or not jobs.driver_lost(client.get_job_info(job)):
            break
        rest = jobs.REST * 2**number
        typer.echo(
            f"the driver was lost; submitted again in {rest:g} s ({number + 1} of {retries} times), it "
            "continues the run",
            err=True,
        )
        time.sleep(rest)
        job = again()
    return code


@cli.app.command()
def job(config: cli.ConfigFile, run_dir: RunDir, overrides: cli.Overrides = None, quiet: cli.Quiet = False) -> None:
    """Run CONFIG on the Ray cluster around this process, as ``submit`` does: what a RayJob or a batch script calls.

    First the storage is checked on all nodes. A run of the same config that the folder holds already is continued.
    """
    folder = run_dir.absolute()
    # a stopped job gets it; nodes that a script starts have switched it off
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with cli.sentences(cli.USAGE):
        settings = cli.checked(config, [*(overrides or []), JOINED], also=[])
        from pipeline.console.displays import Display
        from pipeline.job import run_job
    with cli.sentences(cli.FAILED, resumable=folder):
        done = run_job(settings, folder, Display() if quiet else None)
    cli.finish(done, quiet)


@cli.app.command()
def scale(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run that is in its improve stage, or will be.")
    ],
    workers: Annotated[
        int | None, typer.Option("--rollout-workers", min=1, help="As many from the next update on.")
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Leave it to cluster.autoscale again.")] = False,
) -> None:
    """Change the number of rollout workers of a run while it goes on."""
    folder = run_dir.absolute()
    with cli.sentences(cli.USAGE):
        cli.run_folder(folder)
        if (workers is None) != auto:
            raise ValueError("give either --rollout-workers N or --auto")
        if (folder / stage_record(IMPROVE)).is_file():
            raise ValueError(f"{folder} is done with its improve stage: there is nothing to scale")
        from pipeline.runs.control import write_request

        write_request(folder, workers)
    asked = "as many as cluster.autoscale finds right" if auto else f"{workers} rollout workers"
    typer.echo(f"asked for {asked}; the run takes it up before its next update, and its log says so")


def _examined(path: Path, overrides: list[str]) -> tuple[RunConfig | None, list[str], list[str]]:
    """As ``cli.examine``; but that a path is not on this machine is a warning: the job looks on every node."""
    from configs.loading import ConfigErrors, load_config
    from configs.paths import missing_paths
    from pipeline.preflight.check import check, tracking_problems

    try:
        config = load_config(path, overrides, check_paths=False)
    except ConfigErrors:
        return cli.examine(path, overrides)
    errors, warnings = check(config)
    elsewhere = {*missing_paths(config.model_dump(mode="json")), *tracking_problems(config)}
    here = [error for error in errors if error not in elsewhere]
    return config, here, [*warnings, *(f"{error} (on this machine)" for error in errors if error in elsewhere)]
