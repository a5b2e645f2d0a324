"""What surrounds a command's work: the checks before it, the display of a run, and errors as one sentence with an exit
code."""

from __future__ import annotations

import atexit
import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pipeline.cli.options import DEBUG, FAILED, USAGE
from pipeline.cli.output import print_error, print_problems
from pipeline.runs import interrupts
from pipeline.runs.layout import CONFIG
from pipeline.runs.summary import read_summary

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from pipeline.bank.tasks import MemberTask
    from pipeline.console.displays import Display
    from pipeline.preflight.problems import Findings


def examine(path: Path, overrides: list[str]) -> tuple[RunConfig | None, list[str], list[str]]:
    """The config, or None, with all errors and warnings: those of loading it and those of the preflight together."""
    config, found = examined(path, overrides)
    return config, found.errors, found.warnings


def examined(path: Path, overrides: list[str]) -> tuple[RunConfig | None, Findings]:
    """``examine``, with what was looked at."""
    from configs.loading import ConfigErrors, load_config
    from pipeline.preflight.check import check
    from pipeline.preflight.problems import Findings

    try:
        config = load_config(path, overrides)
    except ConfigErrors as problems:
        errors, found = list(problems.messages), Findings([], [], [])
        if problems.partial is not None:
            found = check(problems.partial)
            # The default in place of a wrong value is not the user's.
            errors += [m for m in found.errors if m not in errors and not any(name in m for name in problems.dropped)]
        return None, found._replace(errors=errors)
    return config, check(config)


Lines = dict[Path, list[str]]
"""Messages by file"""


def examine_tasks(
    bank: Path, files: Sequence[Path], overrides: Sequence[str], out: Path
) -> tuple[list[MemberTask], Lines, Lines]:
    """The tasks of a bank's training, with all errors and warnings of all files; no tasks where there are errors."""
    from pipeline.bank.tasks import TaskErrors, read_tasks
    from pipeline.preflight.check import check

    try:
        tasks = read_tasks(bank, files, overrides, out)
    except TaskErrors as errors:
        return [], {file: list(lines) for file, lines in errors.by_file.items()}, {}
    found = {task.file: check(task.config) for task in tasks}
    wrong = {file: one.errors for file, one in found.items() if one.errors}
    return [] if wrong else tasks, wrong, {file: one.warnings for file, one in found.items() if one.warnings}


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What a run will compute in, and how long it will take: ``Prospect(types=["base.dtype: float32 (...)"],
    seconds={"actions": 61.0}, lines=["base.dtype: ...", "actions   1m01s", "in all    1m01s"])``."""

    types: Sequence[str] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    lines: Sequence[str] = ()


def prospect(config: RunConfig) -> Prospect:
    """Decides the number types of ``config`` and measures its work for a few seconds; where a part of it cannot be done
    before the run, the last line says so."""
    from pipeline.preflight.number_type import decided
    from pipeline.runs.environment import calm_libraries
    from pipeline.runs.forecast import from_speeds, lines

    config, types = decided(config)
    if why := _unmeasured(config):
        return Prospect(types=types, lines=[*types, f"how long it takes was not measured: {why}"])
    from pipeline.stages.speed import measured_speeds

    calm_libraries()
    try:
        speeds = measured_speeds(config)
    except (ValueError, OSError, RuntimeError) as error:
        return Prospect(types=types, lines=[*types, f"how long it takes is not known: {_message(error)}"])
    seconds = from_speeds(config, speeds)
    return Prospect(types=types, seconds=seconds, lines=[*types, *lines(config, seconds, speeds.busy)])


def _unmeasured(config: RunConfig) -> str:
    """Why the work of ``config`` is not tried here before its run; "" where it is."""
    from pipeline.preflight.number_type import devices, free_memory, parameters_of

    if config.cluster.address != "local" or config.rollout.engine != "local":
        return "the work is not this process's (cluster.address, rollout.engine)"
    if config.base.train is not None:
        return "base.train is yet to make the base LM"
    if devices(config) != {"cpu"}:
        return "only processors are measured, not GPUs"
    if (needed := 4 * parameters_of(config)) > free_memory() / 2:
        return f"the base LM's {needed / 2**30:.1f} GiB are more than half of the memory that is free"
    return ""


def checked(path: Path, overrides: list[str], also: list[str], output: RunOutput | None = None) -> RunConfig:
    """The config of a run that may start; otherwise prints every error, those of ``also`` too, and exits with 2."""
    config, errors, warnings = examine(path, overrides)
    errors = errors + also
    print_problems(path, errors, warnings)
    if output is not None:
        output.errors.extend(errors)
    if errors or config is None:
        raise typer.Exit(USAGE)
    return config


class RunOutput:
    """The display of a run, and the errors that ``--json`` repeats in its last line."""

    def __init__(self, display: Display | None) -> None:
        self.display = display
        self.errors: list[str] = []


@contextmanager
def run_output(run_dir: Path, quiet: bool, as_json: bool) -> Iterator[RunOutput]:
    """The display that the options choose. With ``--json`` stdout holds JSON lines only, the last with the exit
    code."""
    if not as_json:
        from pipeline.console import displays

        yield RunOutput(displays.Display() if quiet else None)
        return
    from pipeline.console.json_display import JsonLines, stdout_alone

    with stdout_alone() as out:
        lines = JsonLines(out)
        output, code = RunOutput(lines), FAILED
        try:
            yield output
            code = 0
        except typer.Exit as end:
            code = end.exit_code
            raise
        except Exception as defect:  # it goes on up; the last line of JSON names it
            output.errors.append(f"{type(defect).__name__}: {defect}")
            raise
        finally:
            lines.emit(
                "end",
                exit_code=code,
                errors=output.errors,
                run_dir=str(run_dir),
                gates=read_summary(run_dir).get("gates"),
            )


@contextmanager
def exit_on_error(
    code: int, resumable: Path | None = None, output: RunOutput | None = None, again: str = ""
) -> Iterator[None]:
    """An error that users can cause becomes one sentence and exit code ``code``; a defect keeps its traceback.

    ``resumable``: the run folder that ``latent-control resume`` continues after the error or Ctrl-C. ``again``: what
    goes on after Ctrl-C where that is another command.
    """
    from configs.loading import ConfigErrors
    from pipeline.runs.errors import AtWorkError, NeedsNewRun, RunError

    try:
        yield
    except AtWorkError as error:
        print_error(f"error: {error}")
        if output is not None:
            output.errors.append(str(error))
        raise typer.Exit(USAGE) from None
    except KeyboardInterrupt as error:
        started = bool(again) or (resumable is not None and (resumable / CONFIG).is_file())
        how = again or f"latent-control resume {resumable}"
        print_error(f"\ninterrupted; continue with: {how}" if started else "\ninterrupted")
        # Who sent SIGTERM to a run (a scheduler, mostly) asked for an orderly end, and got it.
        number = getattr(error, "number", signal.SIGINT)
        raise typer.Exit(interrupts.exit_code(number, saved=started)) from None
    except (ValueError, ArithmeticError, OSError, RunError, RecursionError) as error:
        if os.environ.get(DEBUG, "") not in ("", "0"):
            raise
        # Ray passes a worker's error on with its whole traceback as text; its cause is the sentence.
        cause = getattr(error, "cause", None) or error
        hint = "" if code == USAGE else " (the traceback: latent-control --debug ...)"
        messages = cause.messages if isinstance(cause, ConfigErrors) else [_message(cause)]
        for message in messages:
            print_error(f"error: {message}{hint}")
        if output is not None:
            output.errors.extend(messages)
        if resumable is not None and (resumable / CONFIG).is_file():
            again = f"latent-control run {shlex.quote(str(resumable / CONFIG))}"
            print_error(
                f"with the remedy, start a new run: {again} {cause.override}"
                if isinstance(cause, NeedsNewRun)
                else f"after the remedy, continue with: latent-control resume {resumable}"
            )
        raise typer.Exit(code) from None


@contextmanager
def working() -> Iterator[None]:
    """Errors exit with 1; stdout is kept for the result alone, which may be piped: other output goes to stderr."""
    with exit_on_error(FAILED), redirect_stdout(sys.stderr):
        yield


def _message(error: BaseException) -> str:
    """An error's message; the system's own have the file at the end, in quotes and numbers."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error) or type(error).__name__


def existing(path: Path) -> Path:
    """The absolute path; ``FileNotFoundError`` where nothing is there."""
    from configs.paths import nothing_at

    if not path.exists():
        raise FileNotFoundError(nothing_at(path.absolute()))
    return path.absolute()


def run_folder(path: Path) -> Path:
    """The absolute path of a run folder; ``ValueError`` or ``FileNotFoundError`` where it is not one."""
    folder = existing(path)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a run folder: it has no {CONFIG}; give the folder of a run")
    return folder


def new_folder(out: Path | None, kind: str) -> Path:
    """The absolute path of a command's output: ``out``, or else ``runs/<kind>-<time>``, made now so that no command
    started in the same second has the same name, and removed at the end if it stayed empty."""
    if out is not None:
        return out.absolute()
    first = Path("runs", f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    made = [parent for parent in (first.parent,) if not parent.exists()]
    for number in itertools.count(1):
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        try:
            first.parent.mkdir(exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError:  # said where the folder is needed
            return folder
        atexit.register(_remove_empty, [folder, *made])
        return folder
    raise AssertionError


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def empty_folder(out: Path | None, kind: str) -> Path:
    """As ``new_folder``; ``ValueError`` where it holds something already."""
    folder = new_folder(out, kind)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out: {folder} is not empty; give another folder")
    return folder
