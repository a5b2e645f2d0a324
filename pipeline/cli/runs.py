"""Commands that read runs: ``runs``, ``show``, ``audit``, ``diagnose``, ``sync`` and ``reproduce``. Nothing heavy is
imported before one runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE, AsJson, RunFolder
from pipeline.cli.output import closing_words, echo, plan, print_json, print_table
from pipeline.cli.session import exit_on_error, run_folder
from pipeline.runs.layout import CONFIG
from pipeline.runs.summary import read_summary


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Folder of run folders.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """A table of the runs in FOLDER, the newest first: finished, running or interrupted, and its progress."""
    with exit_on_error(USAGE):
        from pipeline.runs import status

        found = status.runs_in(folder.absolute())
    if as_json:
        print_json([asdict(run) | {"folder": str(run.folder)} for run in found])
        return
    print_table(str(folder.absolute()), status.HEAD, [status.cells(run, time.time()) for run in found], drop=True)


@app.command()
def show(run_dir: RunFolder, as_json: AsJson = False) -> None:
    """RUN's status, its results, and the next commands."""
    with exit_on_error(USAGE):
        folder = run_folder(run_dir)
        from configs.loading import load_config
        from pipeline.runs import status

        found = status.overview(folder)
        config = load_config(folder / CONFIG, check_paths=False)
    if as_json:
        print_json(asdict(found) | {"folder": str(folder), "summary": read_summary(folder)})
        return
    echo(f"{found.status}" + (f", {found.stage} {found.step}/{found.total}" if found.total else ""))
    for line in plan(config, read_summary(folder).get("stages", {})):
        echo(line)
    echo(closing_words(folder))
    if found.status == "interrupted":
        echo(f"continue: latent-control resume {run_dir}")


@app.command()
def audit(run_dir: RunFolder, as_json: AsJson = False) -> None:
    """Prove that RUN's reinforcement learning lost no rollout, used none twice, and trained on none too stale or
    foreign (exit 1 if not)."""
    with exit_on_error(USAGE):
        folder = run_folder(run_dir)
        from pipeline.integrity import audit as audits

        findings = audits.audit(folder)
    passed = all(finding.passed for finding in findings)
    if as_json:
        echo(audits.as_json(findings))
    else:
        rows = [(one.stage or "run", one.question, one.verdict, one.answer) for one in findings]
        print_table(str(folder), ("stage", "question", "pass", "answer"), rows)
    if not passed:
        raise typer.Exit(FAILED)


@app.command()
def diagnose(run_dir: RunFolder, as_json: AsJson = False) -> None:
    """Why RUN ended or hangs: one cause, the evidence, and the next command."""
    with exit_on_error(USAGE):
        folder = run_folder(run_dir)
        from pipeline.integrity import diagnose as diagnoses

        found = diagnoses.diagnose(folder)
    if as_json:
        echo(diagnoses.as_json(found))
        return
    echo(f"{found.state}: {found.cause}")
    for line in found.evidence:
        echo(f"  - {line}")
    echo(f"next: {found.next}")


@app.command()
def sync(run_dir: RunFolder) -> None:
    """Send the records of RUN that MLflow lacks, each step once: for a run that ended while the store was away."""
    with exit_on_error(USAGE):
        folder = run_folder(run_dir)
        from pipeline.tracking import sync as syncing
    with exit_on_error(FAILED):
        sent = syncing.sync(folder, echo)
    if not sent:
        raise typer.Exit(FAILED)


@app.command()
@app.command("replay", hidden=True)  # its name before
def reproduce(
    run_dir: RunFolder,
    stage: Annotated[str, typer.Option("--stage", help="improve, or token_level.")] = "improve",
    stored: Annotated[
        bool, typer.Option("--stored", help="Train on the rollouts of the replay buffer instead of sampling again.")
    ] = False,
) -> None:
    """Repeat RUN's reinforcement learning in the order its ledger recorded, and compare every policy's hash (exit 1 if
    one differs)."""
    with exit_on_error(USAGE):
        folder = run_folder(run_dir)
        from pipeline.integrity.reproduce import repeat
    with exit_on_error(FAILED):
        found = repeat(folder, stage, stored=stored, say=echo)
    if found.different is not None:
        echo(f"differs from update {found.different} onwards")
        raise typer.Exit(FAILED)
    echo(f"{found.updates} updates reproduced, every policy bit for bit as recorded")
