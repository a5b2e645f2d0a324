"""Commands ``run``, ``resume`` and ``bank train``. Nothing heavy is imported before one runs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import app, bank_app
from pipeline.cli.options import FAILED, USAGE, AsJson, AsJsonLines, Bank, ConfigFile, Overrides, Quiet, RunFolder
from pipeline.cli.output import echo, finish, print_error, print_json, print_problems, print_table
from pipeline.cli.session import checked, examine_tasks, existing, exit_on_error, new_folder, run_output
from pipeline.runs.layout import CONFIG, LOCK, MANIFEST
from pipeline.storage.disk_space import folder_problems
from pipeline.watch.beside_run import watching

if TYPE_CHECKING:
    from pipeline.bank.trainee import Trainee


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Folder of this run; default runs/<config>-<time>.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJsonLines = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Also serve the page of latent-control watch while it works.")
    ] = False,
) -> None:
    """Run all stages that CONFIG names."""
    folder = new_folder(run_dir, config.stem)
    with run_output(folder, quiet, as_json) as output:
        with exit_on_error(USAGE, output=output):
            from pipeline.runs.folder_name import name_problem

            settings = checked(config, overrides or [], also=_occupied(folder), output=output)
            if problem := name_problem(folder, settings):
                raise ValueError(f"--run-dir: {problem}")
            _make(folder)
            from pipeline.run import run as run_stages
        page = watching(folder, output.display.message if output.display else print_error) if watch else nullcontext()
        with exit_on_error(FAILED, resumable=folder, output=output), page:
            done = run_stages(settings, folder, output.display)
        finish(done, quiet, as_json)


@app.command()
def resume(
    run_dir: RunFolder,
    quiet: Quiet = False,
    as_json: AsJsonLines = False,
    restore_config: Annotated[
        bool, typer.Option("--restore-config", help="Restore a config.yaml that was changed after the run had started.")
    ] = False,
) -> None:
    """Continue a run from its last checkpoint."""
    folder = run_dir.absolute()
    with run_output(folder, quiet, as_json) as output:
        with exit_on_error(USAGE, output=output):
            existing(folder)
            # The config is restored from the manifest.
            if not (folder / CONFIG).is_file() and not (folder / MANIFEST).is_file():
                raise ValueError(
                    f"{folder} is not a run folder: it has no {CONFIG}; start one with latent-control run CONFIG "
                    f"--run-dir {folder}"
                )
            from pipeline.run import resume as resume_stages
        with exit_on_error(FAILED, resumable=folder, output=output):
            done = resume_stages(folder, output.display, restore_config)
        finish(done, quiet, as_json)


@bank_app.command("train")
def bank_train(
    bank: Bank,
    tasks: Annotated[
        list[Path], typer.Argument(metavar="TASK.yaml...", help="One file for each policy (docs/bank.md).")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help="For the run folders; one of an earlier start goes on from there."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of all tasks.")
    ] = None,
    only_check: Annotated[
        bool, typer.Option("--check", help="Check all tasks and estimate the time; start nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train many policies of a bank at once, on one group of rollout workers; each is added when it has finished."""
    folder = new_folder(out, f"bank-{bank.name}")
    say = (lambda text, kind="", **facts: None) if quiet else (lambda text, kind="", **facts: print_error(text))
    with exit_on_error(USAGE):
        found, wrong, warnings = examine_tasks(bank.absolute(), tasks, settings or [], folder)
        for file in dict.fromkeys([*wrong, *warnings]):
            print_problems(file, wrong.get(file, []), warnings.get(file, []))
        if wrong:
            raise typer.Exit(USAGE)
        from pipeline.bank import estimate
        from pipeline.bank.train import train
        from pipeline.bank.trainee import hand_over
        from pipeline.runs.process import at_work_elsewhere

        if not only_check and at_work_elsewhere(folder):
            hand_over(bank.absolute(), found, folder)
            echo(f"handed over to the training at work in {folder}: {', '.join(task.name for task in found)}")
            return
        if only_check or not quiet:
            for line in estimate.lines([task.config for task in found]):
                say(line)
        if only_check:
            return
    with exit_on_error(FAILED, again=f"the same command with --out {folder}"):
        ended = train(bank.absolute(), found, folder, say=say)
    _report_trained(bank, folder, ended, as_json)


@bank_app.command("stop")
def bank_stop(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of bank train --out, at work.")],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Policies to stop.")],
) -> None:
    """Stop policies of a training at work, and save what they have done; bank train with their files goes on."""
    with exit_on_error(USAGE):
        from pipeline.bank.inbox import ask
        from pipeline.runs.process import at_work_elsewhere

        folder = existing(folder)
        if missing := [name for name in names if not (folder / name / CONFIG).is_file()]:
            raise ValueError(f"{folder} has no policy {missing[0]!r:.80}: give the names of its folders")
        if not at_work_elsewhere(folder):
            raise ValueError(f"nobody trains in {folder} now: there is nothing to stop")
        for name in names:
            ask(folder, name, "stop")
    echo(f"asked to stop: {', '.join(names)}")


def _report_trained(bank: Path, folder: Path, ended: list[Trainee], as_json: bool) -> None:
    rows = [one.summary() for one in ended]
    if as_json:
        print_json({"bank": str(bank), "folder": str(folder), "policies": rows})
    else:
        columns = ["name", "state", "member", "updates", "reward_first", "reward_last", "run"]
        print_table(str(folder), columns, [[_cell(row[column]) for column in columns] for row in rows])
        echo(f"serve them: latent-control serve {bank}")
    if failed := [one for one in ended if one.state == "failed"]:
        for one in failed:
            print_error(f"error: {one.name}: {one.reason}")
        print_error("after the remedy, the same command with this --out goes on where each policy was")
        raise typer.Exit(FAILED)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _occupied(folder: Path) -> list[str]:
    if not folder.exists() or (folder.is_dir() and not any(path.name != LOCK for path in folder.iterdir())):
        return list(folder_problems(folder, "--run-dir"))
    if not folder.is_dir():
        return [f"--run-dir: {folder} is a file; give a folder"]
    return [
        f"--run-dir: {folder} is not empty; continue that run with latent-control resume {folder}, or give "
        "another folder"
    ]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--run-dir: cannot make {folder} ({error.strerror}); give a folder that can be written"
        ) from error
