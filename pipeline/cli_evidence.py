"""Commands that judge finished runs: ``reward report``, ``compare``, and ``pilot``. Nothing heavy is imported before one runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline import cli

reward_app = typer.Typer(no_args_is_help=True, help="What the reward is made of.")
cli.app.add_typer(reward_app, name="reward")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table, as wide as it needs to be where output is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


@reward_app.command("report")
def reward_report(run_dir: Run, as_json: cli.AsJson = False) -> None:
    """Distribution, correlation and trend of each part of RUN's reward; flags parts that rise while success does not."""
    folder = run_dir.absolute()
    with cli.sentences(cli.USAGE):
        cli.run_folder(folder)
        from pipeline import reward_report as rewards

        result = rewards.report(folder)
    with cli.sentences(cli.FAILED):
        page, not_tracked = rewards.write_page(result, folder)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for name, level in result["levels"].items():
        print_table(f"level {name}: {level['rollouts']} rollouts of {level['updates']} updates", rewards.HEAD, rewards.table(level))
        for flag in level["flags"]:
            typer.echo(f"FLAG {rewards.sentence(flag)}")
            typer.echo("  read: " + ", ".join(r["rollout_id"] for r in flag["rollouts"]))
            for rollout in flag["rollouts"]:
                typer.echo(f"    {' '.join(rollout['prompt_text'].split())[-60:]!r} -> {' '.join(rollout['text'].split())[:100]!r}")
        if not level["flags"]:
            typer.echo("no flag: nothing rises while success falls or stands still")
    typer.echo(f"page: {page}" + (f" (not in MLflow: {not_tracked})" if not_tracked else " (also in MLflow)"))
