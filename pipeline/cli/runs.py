"""Commands that look at runs: ``runs``, ``show``, ``audit``, ``diagnose``, ``sync``,
``replay``. Nothing heavy is imported before one runs."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import app as cli
from pipeline.cli.compare import print_table


@cli.app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the run folders lie.")] = Path("runs"),
    as_json: cli.AsJson = False,
) -> None:
    """A table of the runs in FOLDER, the newest first: finished, running or interrupted, and what each has reached."""
    with cli.sentences(cli.USAGE):
        from pipeline.runs import status

        found = status.runs_in(folder.absolute())
    if as_json:
        typer.echo(json.dumps([asdict(run) | {"folder": str(run.folder)} for run in found], indent=2))
        return
    print_table(str(folder.absolute()), status.HEAD, [status.cells(run, time.time()) for run in found])


@cli.app.command()
def show(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: cli.AsJson = False
) -> None:
    """Where RUN stands, what it found, and what can be done next."""
    folder = run_dir.absolute()
    with cli.sentences(cli.USAGE):
        cli.run_folder(folder)
        from configs.loading import load_config
        from pipeline.runs import status

        found = status.overview(folder)
        config = load_config(folder / cli.RUN_CONFIG, check_paths=False)
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"folder": str(folder), "summary": cli._summary(folder)}, indent=2))
        return
    typer.echo(f"{found.status}" + (f", {found.stage} {found.step}/{found.total}" if found.total else ""))
    for line in cli.plan(config):
        typer.echo(line)
    typer.echo(cli.closing_words(folder))
    if found.status == "interrupted":
        typer.echo(f"go on: latent-control resume {run_dir}")


@cli.app.command()
def audit(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: cli.AsJson = False
) -> None:
    """Prove that RUN's reinforcement learning lost nothing, doubled nothing, and trained on nothing stale or foreign
    (exit 1 if not)."""
    folder = run_dir.absolute()
    with cli.sentences(cli.USAGE):
        cli.run_folder(folder)
        from pipeline.integrity import audit as audits

        findings = audits.audit(folder)
    passed = all(finding.passed for finding in findings)
    if as_json:
        typer.echo(audits.as_json(findings))
    else:
        rows = [(one.stage or "run", one.question, "yes" if one.passed else "NO", one.answer) for one in findings]
        print_table(str(folder), ("stage", "question", "in order", "answer"), rows)
    if not passed:
        raise typer.Exit(cli.FAILED)


@cli.app.command()
def diagnose(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: cli.AsJson = False
) -> None:
    """What ended RUN or holds it up: one cause, the evidence, and the next command."""
    folder = run_dir.absolute()
    with cli.sentences(cli.USAGE):
        cli.run_folder(folder)
        from pipeline.integrity import diagnose as diagnoses

        found = diagnoses.diagnose(folder)
    if as_json:
        typer.echo(diagnoses.as_json(found))
        return
    typer.echo(f"{found.state}: {found.cause}")
    for line in found.evidence:
        typer.echo(f"  - {line}")
    typer.echo(f"next: {found.next}")


@cli.app.command()
def sync(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Send to MLflow what it lacks of RUN, each step once: after a run that ended while the store was away."""
    folder = run_dir.absolute()
    with cli.sentences(cli.USAGE):
        cli.run_folder(folder)
        from pipeline.tracking import sync as syncing
    with cli.sentences(cli.FAILED):
        sent = syncing.sync(folder, typer.echo)
    if not sent:
        raise typer.Exit(cli.FAILED)


@cli.app.command("replay")
def replay_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    stage: Annotated[str, typer.Option("--stage", help="improve, or token_level.")] = "improve",
    stored: Annotated[
        bool, typer.Option("--stored", help="Train on the rollouts of the replay buffer instead of sampling anew.")
    ] = False,
) -> None:
    """Repeat RUN's reinforcement learning in the order its ledger recorded, and compare every policy's hash (exit 1 if
    one differs)."""
    folder = run_dir.absolute()
    with cli.sentences(cli.USAGE):
        cli.run_folder(folder)
        from pipeline.integrity import reproduce
    with cli.sentences(cli.FAILED):
        found = reproduce.repeat(folder, stage, stored=stored, say=typer.echo)
    if found.different is not None:
        typer.echo(f"differs from update {found.different} on")
        raise typer.Exit(cli.FAILED)
    typer.echo(f"{found.updates} updates repeated, every policy bit for bit as recorded")
