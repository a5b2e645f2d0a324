"""Commands ``config check``, ``config show``, ``config schema`` and ``config reference``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.options import USAGE, AsJson, ConfigFile, Overrides
from pipeline.cli.output import echo, plan, print_json, print_problems
from pipeline.cli.session import Prospect, examined, exit_on_error, prospect
from pipeline.storage.disk_space import folder_problems

config_app = typer.Typer(no_args_is_help=True, help="Check, show or describe a config.")
app.add_typer(config_app, name="config")


@config_app.command("check")
def config_check(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Dry run: report every problem that can be found before work starts. Exit code 2 if there is one."""
    with exit_on_error(USAGE):
        settings, (errors, warnings, notes) = examined(config, overrides or [])
        errors += folder_problems(Path("runs"), "--run-dir")
    told = Prospect() if errors or settings is None else prospect(settings)
    if as_json:
        found = {"ok": not errors, "errors": errors, "warnings": warnings, "notes": notes}
        print_json(found | {"number_types": told.types, "seconds": told.seconds})
    else:
        print_problems(config, errors, warnings)
    if errors or settings is None:
        raise typer.Exit(USAGE)
    if not as_json:
        echo("ok")
        for line in [*plan(settings), *(f"  {line}" for line in (*notes, *told.lines))]:
            echo(line)


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the whole config, defaults and recipe filled in, as YAML."""
    from configs.loading import dump_config, load_config
    from configs.recipes import differing, filled

    with exit_on_error(USAGE):
        settings = load_config(config, overrides or [], check_paths=False)
        for line in (*filled(settings), *differing(settings)):
            echo(f"# {line}")
        echo(dump_config(settings), nl=False)


@config_app.command("schema")
def config_schema_command(config: Annotated[str | None, typer.Argument(hidden=True)] = None) -> None:
    """Print the JSON Schema of a config file (for editors); it is the same for every file."""
    from configs.loading import config_schema

    print_json(config_schema())


@config_app.command("reference")
def config_reference() -> None:
    """Print every setting with values, default and meaning, as Markdown (docs/reference.md)."""
    from configs.loading import config_schema
    from configs.reference import reference

    echo(reference(config_schema()), nl=False)
