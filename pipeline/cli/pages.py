"""Commands that write pages: ``explain`` and ``report``. Nothing heavy is imported before one runs."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import app as cli

MOST_SHOWN = 5


@cli.app.command()
def explain(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder whose improve stage is done.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The page; default RUN/explorer.html.")] = None,
    against: Annotated[Path | None, typer.Option("--against", help="Another run, shown side by side.")] = None,
    rollouts: Annotated[
        int | None, typer.Option("--rollouts", min=1, help="Rollouts on the page; default: the config's.")
    ] = None,
    explained: Annotated[
        int | None, typer.Option("--explained", min=0, help="Rollouts with every choice explained.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.0, help="For what needs the model; 0: none of it.")
    ] = None,
    as_json: cli.AsJson = False,
) -> None:
    """Write RUN's explorer: what its codes do, which carry the gain of RL, and why an output came about. One file, no
    server."""
    folder, other = run_dir.absolute(), None if against is None else against.absolute()
    with cli.sentences(cli.USAGE):
        for one in (folder, *([other] if other else [])):
            cli.run_folder(one)
        from configs.loading import load_config
        from pipeline.pages.explorer import write
        from pipeline.pages.explorer.policies import policies_of

        for one in (folder, *([other] if other else [])):
            policies_of(one, hashes=False)  # says in words what there is nothing to explain about

        asked = {"rollouts": rollouts, "explained": explained, "seconds": seconds}
        settings = load_config(folder / cli.RUN_CONFIG, [], check_paths=False).explorer
        settings = settings.model_copy(update={name: value for name, value in asked.items() if value is not None})
    name = cli.EXPLORER if other is None else f"explorer-against-{other.name}.html"
    path = (out or folder / name).absolute()
    with cli.sentences(cli.FAILED), redirect_stdout(sys.stderr):
        datasets, not_tracked = write.explain(folder, path, settings, against=other)
    if as_json:
        from pipeline.pages.explorer.records import as_data

        typer.echo(
            json.dumps({"page": str(path), "runs": [as_data(dataset.summary) for dataset in datasets]}, indent=2)
        )
        return
    for dataset in datasets:
        summary, gains = (
            dataset.summary,
            [(code.gain, k) for k, code in enumerate(dataset.codes) if code.gain is not None],
        )
        typer.echo(f"{summary.run}: reward {summary.reward_first:.3f} to {summary.reward_last:.3f}")
        largest = sorted(gains, key=lambda pair: -pair[0].mean)[:MOST_SHOWN]
        if summary.gain is not None:
            shown = ", ".join(f"{k} ({gain.mean:+.3f})" for gain, k in largest)
            typer.echo(
                f"  estimated gain {summary.gain.mean:+.3f} ({summary.gain.low:+.3f} to "
                f"{summary.gain.high:+.3f}); codes: {shown}"
            )
        for note in summary.notes:
            typer.echo(f"  note: {note}")
    typer.echo(f"page: {path}" + (f" (not in MLflow: {not_tracked})" if not_tracked else " (also in MLflow)"))


@cli.app.command("report")
def report_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The page; default RUN/report.html.")] = None,
) -> None:
    """Write RUN's report: what it found, how, at what cost, and how to do it again. One file, no server."""
    folder = run_dir.absolute()
    with cli.sentences(cli.USAGE):
        cli.run_folder(folder)
        from pipeline.pages.report.write import report
    path = (out or folder / cli.REPORT).absolute()
    with cli.sentences(cli.FAILED), redirect_stdout(sys.stderr):
        made, not_tracked = report(folder, path)
    for name, value, _ in made.tiles:
        typer.echo(f"{name}: {value}")
    typer.echo(f"page: {path}" + (f" (not in MLflow: {not_tracked})" if not_tracked else " (also in MLflow)"))
