"""Commands ``run`` and ``resume``. Nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE, AsJsonLines, ConfigFile, Overrides, Quiet, RunFolder
from pipeline.cli.output import finish
from pipeline.cli.session import checked, existing, exit_on_error, new_folder, run_output
from pipeline.runs.layout import CONFIG, LOCK, MANIFEST
from pipeline.storage.disk_space import folder_problems


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Folder of this run; default runs/<config>-<time>.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJsonLines = False,
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
        with exit_on_error(FAILED, resumable=folder, output=output):
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
