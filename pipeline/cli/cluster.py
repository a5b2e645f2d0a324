"""Commands ``submit``, ``job``, ``cluster-files`` and ``scale``. Nothing heavy is imported before one runs."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE, ConfigFile, Overrides, Quiet
from pipeline.cli.output import echo, finish, print_error, print_problems
from pipeline.cli.session import checked, examine, exit_on_error, run_folder
from pipeline.runs.layout import stage_record
from pipeline.runs.stage_table import IMPROVE

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from configs.schema import RunConfig

RunDir = Annotated[
    Path, typer.Option("--run-dir", help="Folder of the run, on storage that all nodes of the cluster mount.")
]
JOINED = "cluster.address=auto"


@app.command()
def submit(
    config: ConfigFile,
    run_dir: RunDir,
    address: Annotated[str, typer.Option("--address", help="The head's dashboard, e.g. http://HEAD:8265.")],
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log and exit as the job does.")] = True,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="The cluster adds nodes on demand: do not refuse what it has no room for.")
    ] = False,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="Submissions after a killed or lost driver, at most.")
    ] = 0,
) -> None:
    """Run CONFIG as a job of a Ray cluster. Submitted again, it continues. Ctrl-C stops the job; its exit code is
    passed on."""
    with exit_on_error(USAGE):
        settings, errors, warnings = _examined(config, [*(overrides or []), JOINED])
        if not run_dir.is_absolute():
            errors.append(
                f"--run-dir: {run_dir} is relative to a folder that only the driver has; give an absolute path"
            )
        if retries and not wait:
            errors.append("--retries: with --no-wait nothing submits the job again; leave one of them out")
        from pipeline.runs.process import at_work_elsewhere

        if busy := at_work_elsewhere(run_dir):
            errors.append(f"--run-dir: {busy}; follow its job, or give another folder")
        print_problems(config, errors, warnings)
        if settings is None or errors:
            raise typer.Exit(USAGE)
        from pipeline.cluster import submit as jobs
        from pipeline.preflight.resources import cluster_problems

        with jobs.at(address) as client, jobs.staged(settings) as folder:
            scarce = cluster_problems(settings, jobs.node_resources(address))
            print_problems(config, [] if elastic else scarce, scarce if elastic else [])
            if scarce and not elastic:
                raise typer.Exit(USAGE)
            job = _submitted(client, folder, run_dir, address)
            if wait:
                raise typer.Exit(
                    _followed(client, job, address, retries, lambda: _submitted(client, folder, run_dir, address))
                )


def _submitted(client: JobSubmissionClient, folder: Path, run_dir: Path, address: str) -> str:
    from pipeline.cluster import submit as jobs

    job = jobs.submit(client, folder, run_dir)
    print_error(f"submitted {job}; its log: ray job logs --follow --address {address} {job}")
    return job


def _followed(client: JobSubmissionClient, job: str, address: str, retries: int, again: Callable[[], str]) -> int:
    """The exit code of the job, or of its last retry after a lost driver."""
    from pipeline.cluster import submit as jobs

    for end in (signal.SIGINT, signal.SIGTERM):  # a shell that starts this in the background ignores Ctrl-C
        signal.signal(end, signal.default_int_handler)
    code = 1
    for number in range(retries + 1):
        code = jobs.follow(client, job, address, lambda text: echo(text, nl=False), print_error)
        if number == retries or not jobs.driver_lost(client.get_job_info(job)):
            break
        rest = jobs.REST * 2**number
        print_error(
            f"the driver was lost; submitted again in {rest:g} s ({number + 1} of {retries} times), it "
            "continues the run",
        )
        time.sleep(rest)
        job = again()
    return code


@app.command()
def job(config: ConfigFile, run_dir: RunDir, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Run CONFIG on the Ray cluster around this process, as ``submit`` does: what a RayJob or a batch script calls.

    First the storage is checked on all nodes. A run of the same config that the folder holds already is continued.
    """
    folder = run_dir.absolute()
    # A stopped job receives it; processes that a script starts ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with exit_on_error(USAGE):
        settings = checked(config, [*(overrides or []), JOINED], also=[])
        from pipeline.console.displays import Display
        from pipeline.job import run_job
    with exit_on_error(FAILED, resumable=folder):
        done = run_job(settings, folder, Display() if quiet else None)
    finish(done, quiet)


@app.command("cluster-files")
def cluster_files(
    kind: Annotated[Literal["kuberay", "slurm"], typer.Argument(help="A RayJob, or a batch script.")],
    config: ConfigFile,
    run_dir: RunDir,
    overrides: Overrides = None,
    cpus: Annotated[int, typer.Option("--node-cpus", min=1, help="CPUs of a node.")] = 16,
    gpus: Annotated[int, typer.Option("--node-gpus", min=0, help="GPUs of a node.")] = 0,
    memory: Annotated[int, typer.Option("--node-memory", min=1, help="GiB of a node.")] = 64,
    image: Annotated[str, typer.Option("--image", help="kuberay: the image, see the Dockerfile.")] = "latent-control",
    claim: Annotated[
        str, typer.Option("--claim", help="kuberay: the volume claim (ReadWriteMany) that is mounted.")
    ] = "shared-rwx",
) -> None:
    """Print the file that runs CONFIG on Kubernetes or Slurm, with as many nodes as it needs."""
    with exit_on_error(USAGE):
        settings, errors, warnings = _examined(config, [*(overrides or []), JOINED])
        if not run_dir.is_absolute():
            errors.append(f"--run-dir: {run_dir} is relative; give an absolute path that all nodes mount")
        elif kind == "kuberay" and (outside := _outside(config, run_dir)):
            errors.append(outside)
        print_problems(config, errors, warnings)
        if settings is None or errors:
            raise typer.Exit(USAGE)
        from pipeline.cluster.manifests import ClusterPlan, job_name, rayjob, sbatch
        from pipeline.preflight.resources import nodes_needed

        head_cpus = max(0, cpus - settings.cluster.learner_threads)
        plan = ClusterPlan(
            name=job_name(run_dir),
            nodes=nodes_needed(settings, {"CPU": cpus, "GPU": gpus}, {"CPU": head_cpus, "GPU": gpus}),
            cpus=cpus,
            head_cpus=head_cpus,
            gpus=gpus,
            memory=memory,
            command=("latent-control", "job", _named(config), *(overrides or []), "--run-dir", str(run_dir)),
        )
        echo(sbatch(plan) if kind == "slurm" else rayjob(plan, image, claim, _mount(run_dir)), nl=False)


def _named(config: Path) -> str:
    """A config as every node finds it: by its name where it comes with the program, else by its absolute path."""
    from configs.paths import packaged_config

    return str(config) if packaged_config(config) is not None else str(config.absolute())


def _mount(run_dir: Path) -> Path:
    return Path(*run_dir.parts[:2])


def _outside(config: Path, run_dir: Path) -> str:
    named, mount = Path(_named(config)), _mount(run_dir)
    if not named.is_absolute() or named.is_relative_to(mount):
        return ""
    return f"{named} is outside of {mount}, which the pods mount (the first folder of --run-dir); copy it there"


@app.command()
def scale(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run that is in its improve stage, or will be.")
    ],
    workers: Annotated[
        int | None, typer.Option("--rollout-workers", min=1, help="Number of workers from the next update on.")
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Return the choice to cluster.autoscale.")] = False,
) -> None:
    """Change the number of rollout workers of a running run."""
    with exit_on_error(USAGE):
        folder = run_folder(run_dir)
        if (workers is None) != auto:
            raise ValueError("give either --rollout-workers N or --auto")
        if (folder / stage_record(IMPROVE)).is_file():
            raise ValueError(f"{folder} has finished its improve stage: nothing is left to scale")
        from pipeline.runs.control import write_request

        write_request(folder, workers)
    asked = "as many as cluster.autoscale chooses" if auto else f"{workers} rollout workers"
    echo(f"requested {asked}; the run applies it before its next update and logs it")


def _examined(path: Path, overrides: list[str]) -> tuple[RunConfig | None, list[str], list[str]]:
    """As ``examine``, but a path that this machine lacks is a warning: the job checks every node."""
    from configs.loading import ConfigErrors, load_config
    from configs.paths import missing_paths
    from pipeline.preflight.check import check, tracking_problems

    try:
        config = load_config(path, overrides, check_paths=False)
    except ConfigErrors:
        return examine(path, overrides)
    errors, warnings, _ = check(config)
    elsewhere = {*missing_paths(config.model_dump(mode="json")), *tracking_problems(config)}
    here = [error for error in errors if error not in elsewhere]
    return config, here, [*warnings, *(f"{error} (on this machine)" for error in errors if error in elsewhere)]
