"""Commands for pages: ``explain`` and ``report`` write one, ``watch`` serves one. Nothing heavy is imported before one
runs."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE, AsJson
from pipeline.cli.output import echo, print_json, print_page
from pipeline.cli.session import existing, exit_on_error, run_folder, working
from pipeline.cli.shell_completion import run_folders
from pipeline.runs.layout import CONFIG, EXPLORER, REPORT

MOST_SHOWN = 5
LOOPBACK = "127.0.0.1"


@app.command()
def explain(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder whose improve stage is done.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The page; default RUN/explorer.html, or explorer-against-<OTHER>.html."),
    ] = None,
    against: Annotated[Path | None, typer.Option("--against", help="Another run, shown side by side.")] = None,
    rollouts: Annotated[
        int | None, typer.Option("--rollouts", min=1, help="Rollouts on the page; default: the config's.")
    ] = None,
    explained: Annotated[
        int | None, typer.Option("--explained", min=0, help="Rollouts with an analysis of every choice.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.0, help="Time limit of the parts that need the model; 0: none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write RUN's explorer: what its codes do, which carry the gain of RL, and why an output was generated. One file,
    no server."""
    with exit_on_error(USAGE):
        folder, other = run_folder(run_dir), None if against is None else run_folder(against)
        from configs.loading import load_config
        from pipeline.pages.explorer import write
        from pipeline.pages.explorer.policies import policies_of

        for one in (folder, *([other] if other else [])):
            policies_of(one, hashes=False)  # raises where there is nothing to explain

        asked = {"rollouts": rollouts, "explained": explained, "seconds": seconds}
        settings = load_config(folder / CONFIG, [], check_paths=False).explorer
        settings = settings.model_copy(update={name: value for name, value in asked.items() if value is not None})
    name = EXPLORER if other is None else f"explorer-against-{other.name}.html"
    path = (out or folder / name).absolute()
    with working():
        datasets, not_tracked = write.explain(folder, path, settings, against=other)
    if as_json:
        from pipeline.pages.records import as_data

        print_json({"page": str(path), "runs": [as_data(dataset.summary) for dataset in datasets]})
        return
    for dataset in datasets:
        summary, gains = (
            dataset.summary,
            [(code.gain, k) for k, code in enumerate(dataset.codes) if code.gain is not None],
        )
        echo(f"{summary.run}: reward {summary.reward_first:.3f} to {summary.reward_last:.3f}")
        largest = sorted(gains, key=lambda pair: -pair[0].mean)[:MOST_SHOWN]
        if summary.gain is not None:
            shown = ", ".join(f"{k} ({gain.mean:+.3f})" for gain, k in largest)
            echo(
                f"  estimated gain {summary.gain.mean:+.3f} ({summary.gain.low:+.3f} to "
                f"{summary.gain.high:+.3f}); codes: {shown}"
            )
        for note in summary.notes:
            echo(f"  note: {note}")
    print_page(path, not_tracked)


@app.command("report")
def report_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The page; default RUN/report.html.")] = None,
) -> None:
    """Write RUN's report: what it found, how, at what cost, and how to do it again. One file, no server."""
    with exit_on_error(USAGE):
        folder = run_folder(run_dir)
        from pipeline.pages.report.write import report
    path = (out or folder / REPORT).absolute()
    with working():
        made, not_tracked = report(folder, path)
    for name, value, _ in made.tiles:
        echo(f"{name}: {value}")
    print_page(path, not_tracked)


@app.command()
def watch(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|FOLDER",
            help="A run folder, at work or finished, or a folder of runs.",
            autocompletion=run_folders,
        ),
    ],
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Default: 8080, or the next free one.")
    ] = None,
    model_gib: Annotated[
        float,
        typer.Option(
            "--model-gib", min=0.0, help="GiB of weights of the largest model that counterfactuals and steering load."
        ),
    ] = 4.0,
) -> None:
    """Watch RUN while it works: curves, rollouts, counterfactuals, codes, cost, steering, on a local page that only its
    printed link opens."""
    with exit_on_error(USAGE):
        folder = existing(target)
        if not (folder / CONFIG).is_file() and not any(folder.glob(f"*/{CONFIG}")):
            raise ValueError(
                f"{folder} is neither a run folder nor a folder of runs: no {CONFIG} lies in it or below it"
            )
        from pipeline.evaluation.statistics import student
        from pipeline.watch.followed_run import FollowedRuns
        from pipeline.watch.web import application
        from pipeline.web.guard import new_token
        from pipeline.web.server import listen, serve

        student(1)  # imports scipy, which the first curve should not wait for
        listener, token, ending = listen(LOOPBACK, port), new_token(), threading.Event()
    with exit_on_error(FAILED), listener, closing(FollowedRuns(folder, model_gib)) as runs:
        serve("watch page", application(runs, LOOPBACK, token, ending), listener, token, echo, ending)
