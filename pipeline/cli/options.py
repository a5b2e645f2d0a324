"""Arguments and options that several commands share, and the exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import shell_completion

FAILED, USAGE, GATES, INTERRUPTED = 1, 2, 3, 130
DEBUG = "LATENT_CONTROL_DEBUG"
EXIT_CODES = (
    "Exit codes: 0 done; 1 failed while working; 2 wrong config or usage, nothing was started; 3 done, but a gate of "
    "the config failed; 130 interrupted (0 after SIGTERM: the state is saved)."
)


def _say_which(given: Path) -> Path:
    """Says so when a bare name stands for a config that comes with the program."""
    from configs.paths import packaged_config

    if (found := packaged_config(given)) is not None:
        typer.echo(f"{given}: {found}, which comes with this program", err=True)
    return given


ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file, or the name of one that comes with this program, e.g. quickstart.",
        callback=_say_which,
        autocompletion=shell_completion.config_files,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value]...",
        help="Override values, e.g. improve.updates=3.",
        autocompletion=shell_completion.overrides,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
AsJsonLines = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per line on stdout, nothing else (docs/terminal.md).")
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder.", autocompletion=shell_completion.run_folders)
]
Bank = Annotated[Path, typer.Argument(metavar="BANK", help="The bank's folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only; metrics.jsonl is still written.")]
