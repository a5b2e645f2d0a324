"""The command line, ``latent-control``. Nothing heavy is imported before a command needs it: ``--help`` is instant.

Exit codes: 0 done; 1 failed while working; 2 wrong config or usage, nothing was started; 3 done, but a gate of the
config failed (docs/evaluation.md); 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import shell_completion
from pipeline.runs.layout import CONFIG as RUN_CONFIG
from pipeline.runs.layout import EXPLORER, MANIFEST, REPORT, SUMMARY

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from pipeline.console.displays import Display

FAILED, USAGE, GATES, INTERRUPTED = 1, 2, 3, 130
DEBUG = "LATENT_CONTROL_DEBUG"


class Estimator(StrEnum):
    """Names of ``latent_control.off_policy.ESTIMATORS``, which the command line does not import."""

    ips = "ips"
    wis = "wis"
    dr = "dr"
    wdr = "wdr"


EXIT_CODES = (
    "Exit codes: 0 done; 1 failed while working; 2 wrong config or usage, nothing was started; 3 done, but a gate of "
    "the config failed; "
    "130 interrupted (0 after SIGTERM: the state is saved)."
)
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich", epilog=EXIT_CODES)
config_app = typer.Typer(no_args_is_help=True, help="Check, show or describe a config.")
app.add_typer(config_app, name="config")

ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file, e.g. configs/quickstart.yaml.",
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
JsonLines = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per line on stdout, nothing else (docs/terminal.md).")
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder.", autocompletion=shell_completion.run_folders)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only; metrics.jsonl is written all the same.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        from pipeline.console.json_display import own_version

        typer.echo(f"latent-control {own_version()}")
        raise typer.Exit


@app.callback()
def latent_control(
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks (also by {DEBUG}=1).")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Say the version.")
    ] = False,
) -> None:
    """Teach a language model latent actions, then improve it by reinforcement learning over them.

    Begin with: latent-control run configs/quickstart.yaml
    """
    if debug:
        os.environ[DEBUG] = "1"


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Folder of this run; default runs/<config>-<time>.")
    ] = None,
    quiet: Quiet = False,
    as_json: JsonLines = False,
) -> None:
    """Run all stages that CONFIG names."""
    folder = (run_dir or Path("runs") / f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    with reporting(folder, quiet, as_json) as report_to:
        with sentences(USAGE, report_to=report_to):
            settings = checked(config, overrides or [], also=_occupied(folder), report_to=report_to)
            _make(folder)
            from pipeline.run import run as run_stages
        with sentences(FAILED, resumable=folder, report_to=report_to):
            done = run_stages(settings, folder, report_to.display)
        finish(done, quiet, as_json)


@app.command()
def resume(
    run_dir: RunFolder,
    quiet: Quiet = False,
    as_json: JsonLines = False,
    restore_config: Annotated[
        bool, typer.Option("--restore-config", help="Put a changed config.yaml back to what it was.")
    ] = False,
) -> None:
    """Continue a run where its last checkpoint stands."""
    folder = run_dir.absolute()
    with reporting(folder, quiet, as_json) as report_to:
        with sentences(USAGE, report_to=report_to):
            _existing(folder)
            # from which the config is put back
            if not (folder / RUN_CONFIG).is_file() and not (folder / MANIFEST).is_file():
                raise ValueError(
                    f"{folder} is no run folder: it has no {RUN_CONFIG}; start one with latent-control run CONFIG "
                    f"--run-dir {folder}"
                )
            from pipeline.run import resume as resume_stages
        with sentences(FAILED, resumable=folder, report_to=report_to):
            done = resume_stages(folder, report_to.display, restore_config)
        finish(done, quiet, as_json)


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A run folder or a checkpoint folder.")],
    prompts: Annotated[int | None, typer.Option("--prompts", min=1, help="Held-out prompts to play.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Use this config's task and rollout settings, not the run's.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the sampled pass.")] = None,
    as_json: AsJson = False,
) -> None:
    """Play held-out prompts with a run's models, or with one checkpoint. Exit code 3 when a gate of the config
    fails."""
    target = target.absolute()
    with sentences(USAGE):
        _existing(target)
        settings = _evaluation_config(target, config, seed)
        from pipeline.stages.evaluate import evaluate as evaluate_target
    # The result alone goes to stdout: it may be piped.
    with sentences(FAILED), redirect_stdout(sys.stderr):
        result = evaluate_target(target, config=settings, prompts=prompts)
    typer.echo(json.dumps(result, indent=2) if as_json else result_table(result))
    pass_gates(result.get("gates"), quiet=as_json)


@app.command("off-policy")
def off_policy(
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="A checkpoint folder, or a run folder: then its last policy.")
    ],
    replay: Annotated[
        list[Path], typer.Option("--replay", help="A run folder with rollouts of other policies; may be repeated.")
    ],
    last_updates: Annotated[
        int | None, typer.Option("--last-updates", min=1, help="Only rollouts of the newest so many updates.")
    ] = None,
    versions: Annotated[
        str | None, typer.Option("--versions", metavar="FIRST-LAST", help="Only rollouts of these policies.")
    ] = None,
    estimator: Annotated[Estimator, typer.Option("--estimator", help="The one the verdict goes by.")] = Estimator.dr,
    at_least: Annotated[
        float | None, typer.Option("--at-least", help="The reward it must surely reach; default: the behaviour's own.")
    ] = None,
    weight_cap: Annotated[float | None, typer.Option("--weight-cap", min=1.0, help="Truncate weights there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a policy's reward from other policies' rollouts, without playing; may it go online?"""
    with sentences(USAGE):
        for folder in (target, *replay):
            _existing(folder.absolute())
        window = _versions(versions)
        from pipeline.experiments.off_policy import judge
    with sentences(FAILED), redirect_stdout(sys.stderr):
        result = judge(
            target.absolute(),
            [path.absolute() for path in replay],
            last_updates=last_updates,
            versions=window,
            weight_cap=weight_cap,
            estimator=estimator.value,
            at_least=at_least,
        )
    typer.echo(json.dumps(result, indent=2) if as_json else off_policy_table(result))


@config_app.command("check")
def config_check(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Dry run: find everything that can be wrong before work starts. Exit code 2 when something is."""
    with sentences(USAGE):
        settings, errors, warnings = examine(config, overrides or [])
    if as_json:
        typer.echo(json.dumps({"ok": not errors, "errors": errors, "warnings": warnings}, indent=2))
    else:
        report(config, errors, warnings)
    if errors or settings is None:
        raise typer.Exit(USAGE)
    if not as_json:
        typer.echo("ok")
        for line in plan(settings):
            typer.echo(line)


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the whole config, defaults filled in, as YAML."""
    from configs.loading import dump_config, load_config

    with sentences(USAGE):
        typer.echo(dump_config(load_config(config, overrides or [], check_paths=False)), nl=False)


@config_app.command("schema")
def config_schema_command(config: Annotated[str | None, typer.Argument(hidden=True)] = None) -> None:
    """Print the JSON Schema of a config file (for editors); it is the same for every file."""
    from configs.loading import config_schema

    typer.echo(json.dumps(config_schema(), indent=2))


@config_app.command("reference")
def config_reference() -> None:
    """Print every setting with values, default and meaning, as Markdown (docs/reference.md)."""
    from configs.loading import config_schema
    from configs.reference import reference

    typer.echo(reference(config_schema()), nl=False)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, what is missing, and the command that installs it."""
    from pipeline.preflight import doctor as examination

    findings = examination.examine()
    typer.echo(json.dumps(examination.as_data(findings), indent=2) if as_json else examination.as_text(findings))
    raise typer.Exit(0 if examination.is_fine(findings) else FAILED)


@app.command()
def ui(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A run folder, a folder of runs, an mlflow.db file or a store URI.")
    ],
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Default: 5000, or the next free one.")
    ] = None,
) -> None:
    """Start an MLflow server on a run's store and print the links; stops with Ctrl-C."""
    from pipeline.tracking import server

    with sentences(USAGE):
        store = server.find_store(target)
        chosen = server.choose_port(port)
    with sentences(FAILED):
        server.serve(store, chosen, typer.echo)


def examine(path: Path, overrides: list[str]) -> tuple[RunConfig | None, list[str], list[str]]:
    """The config, or None, and all errors and warnings: those of reading it and those of the preflight together."""
    from configs.loading import ConfigErrors, load_config
    from pipeline.preflight.check import check

    try:
        config = load_config(path, overrides)
    except ConfigErrors as problems:
        errors, warnings = list(problems.messages), list[str]()
        if problems.partial is not None:
            more, warnings = check(problems.partial)
            # What stands in for a wrong value says nothing about the config.
            errors += [m for m in more if m not in errors and not any(name in m for name in problems.dropped)]
        return None, errors, warnings
    errors, warnings = check(config)
    return config, errors, warnings


def checked(path: Path, overrides: list[str], also: list[str], report_to: Report | None = None) -> RunConfig:
    """The config of a run that may start; otherwise prints every error, those of ``also`` too, and exits with 2."""
    config, errors, warnings = examine(path, overrides)
    errors = errors + also
    report(path, errors, warnings)
    if report_to is not None:
        report_to.errors += errors
    if errors or config is None:
        raise typer.Exit(USAGE)
    return config


def report(path: Path, errors: list[str], warnings: list[str]) -> None:
    """Warnings and errors to stderr, one line each."""
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    if errors:
        typer.echo(f"{path}: {len(errors)} {'error' if len(errors) == 1 else 'errors'}, nothing was started", err=True)
        for error in errors:
            typer.echo(f"  - {error}", err=True)


def plan(config: RunConfig) -> Iterator[str]:
    """One line for each stage that will run."""
    for stage in config.stages:
        yield f"  {stage:9} {_stage_line(config, stage)}"
    learners = (
        f"{config.cluster.num_learners} learner actors" if config.cluster.num_learners else "the learner in the driver"
    )
    yield f"  ray       {config.cluster.address}: {config.rollout.num_workers} rollout workers, {learners}"


def _stage_line(config: RunConfig, stage: str) -> str:
    from configs.checks import offline_sections

    if stage == "evaluate":
        assert config.evaluation is not None
        return f"{config.evaluation.prompts} held-out prompts of {config.task.name}"
    if stage == "improve":
        assert config.improve is not None
        i = config.improve
        return (
            f"{i.updates} {i.algorithm} updates of {i.prompts_per_update} prompts x {i.group_size} rollouts, "
            f"{i.level} level, {i.mode}"
        )
    section = dict(offline_sections(config))["base.train" if stage == "base" else stage]
    data = " + ".join(source.kind for source in section.data)
    codes = f", {config.actions.num_actions} codes" if stage == "actions" and config.actions else ""
    return f"{section.updates} updates of {section.batch_size} sequences ({data}){codes}"


class Report:
    """What a program is told of a run at its end (``--json``), and the display on the way."""

    def __init__(self, display: Display | None) -> None:
        self.display = display
        self.errors: list[str] = []


@contextmanager
def reporting(run_dir: Path, quiet: bool, as_json: bool) -> Iterator[Report]:
    """The display that the options ask for. With ``--json`` stdout holds nothing but its lines, the last of which has
    the exit code."""
    if not as_json:
        from pipeline.console import displays

        yield Report(displays.Display() if quiet else None)
        return
    from pipeline.console.json_display import JsonLines as Lines
    from pipeline.console.json_display import stdout_alone

    with stdout_alone() as out:
        lines = Lines(out)
        report_to, code = Report(lines), FAILED
        try:
            yield report_to
            code = 0
        except typer.Exit as end:
            code = end.exit_code
            raise
        except Exception as defect:
            report_to.errors.append(f"{type(defect).__name__}: {defect}")
            raise
        finally:
            lines.emit(
                "end",
                exit_code=code,
                errors=report_to.errors,
                run_dir=str(run_dir),
                gates=_summary(run_dir).get("gates"),
            )


def finish(run_dir: Path, quiet: bool, as_json: bool = False) -> None:
    """The last words of a run, then the gates."""
    if not (quiet or as_json):
        typer.echo(closing_words(run_dir))
    pass_gates(_summary(run_dir).get("gates"), quiet or as_json)


def pass_gates(gates: dict[str, Any] | None, quiet: bool) -> None:
    """Each gate's verdict with its value, the failed ones to stderr; exits with 3 when one failed."""
    for verdict in gates["verdicts"] if gates else ():
        found = "not measured" if verdict["value"] is None else f"{verdict['value']:.4g}"
        word = "passed" if verdict["passed"] else "FAILED"
        if not (quiet and verdict["passed"]):
            typer.echo(f"gate {word}: {verdict['gate']}  ({verdict['variant']}: {found})", err=not verdict["passed"])
    if gates and not gates["passed"]:
        raise typer.Exit(GATES)


def _summary(run_dir: Path) -> dict[str, Any]:
    path = run_dir / SUMMARY
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def closing_words(run_dir: Path) -> str:
    """What a run ends with: its evaluation as a table, its folder, and how to look at it."""
    summary = _summary(run_dir)
    table = f"{result_table(summary['evaluation'])}\n" if "evaluation" in summary else ""
    warnings = "".join(f"{warning}\n" for warning in summary.get("warnings", []))
    explorer = f"\nwhat the codes do: {run_dir / EXPLORER}" if (run_dir / EXPLORER).is_file() else ""
    report = f"\nall of it on one page: {run_dir / REPORT}" if (run_dir / REPORT).is_file() else ""
    return f"{table}{warnings}run folder: {run_dir}\nlearning curves: latent-control ui {run_dir}{explorer}{report}"


def result_table(result: dict[str, Any]) -> str:
    """An evaluation as aligned text: success of each model with its 95 % interval, then what improved over what."""
    rows = {name: value for name, value in result.items() if isinstance(value, dict) and "greedy" in value}
    table = [["success", "sampled", "95 % interval", "greedy", "95 % interval", "tokens"]]
    table += [
        [name, *(cell for p in ("sampled", "greedy") for cell in _success(row, p)), f"{row['sampled_tokens']:.1f}"]
        for name, row in rows.items()
    ]
    lines = aligned(table)
    lines += _gains(result.get("differences", {}))
    samples = result.get("samples_per_prompt", 1)
    times = "once" if samples == 1 else f"{samples} times"
    lines += [*_more(rows), *_slice_lines(rows)]
    return "\n".join([*lines, f"{result['prompts']} held-out prompts, each played {times} sampled and once greedy"])


# Shown below the table, where measured: name in the evaluation, format.
SHOWN: tuple[tuple[str, str], ...] = (
    ("semantic_diversity", ".3f"),
    ("distinct_2", ".3f"),
    ("differing_pairs_successful", ".3f"),
    ("nll", ".3f"),
    ("nll_rise", "+.3f"),
    ("kl_to_base", ".3f"),
    ("code_perplexity", ".1f"),
    ("coverage", ".3f"),
)


def _more(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line for each other measure: its value for every variant that has it."""
    passes = sorted(
        {key for row in rows.values() for key in row if key.startswith("pass_at_") and not key.endswith("_interval")},
        key=_k,
    )
    for key, form in (*((key, ".3f") for key in passes), *SHOWN):
        values = [f"{name} {row[key]:{form}}" for name, row in rows.items() if row.get(key) is not None]
        if values:
            yield f"{key}: {', '.join(values)}"


def _k(name: str) -> int:
    return int(name.removeprefix("pass_at_"))


def _slice_lines(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The largest gap of every variant by field, sampled."""
    for name, row in rows.items():
        for field, gaps in row.get("slice_gaps", {}).items():
            if (gap := gaps["sampled"]) is not None:
                yield (
                    f"slice_gap of {name} by {field}: {gap['gap']:.3f} ({gap['low']:.3f} to {gap['high']:.3f}; by "
                    "chance below "
                    f"{gap['by_chance']:.3f}), best {gap['largest']}, worst {gap['smallest']}"
                )


def aligned(table: list[list[str]]) -> list[str]:
    """Lines of cells in columns."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def off_policy_table(result: dict[str, Any]) -> str:
    """Off-policy estimates as aligned text, what speaks for and against them, and the verdict."""
    report = result["report"]
    rows = {"behaviour": report["behaviour"]} | report["estimates"]
    table = [["reward", "estimate", "95 % interval", "gain", "95 % interval"]]
    for name, row in rows.items():
        gain = report["gains"].get(name)
        more = [f"{gain['value']:+.3f}", f"{gain['low']:+.3f} - {gain['high']:+.3f}"] if gain else ["", ""]
        table.append([name, f"{row['value']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}", *more])
    weight = report["mean_weight"]
    lines = aligned(table)
    lines.append(f"{report['rollouts']} rollouts of {report['prompts']} prompts; effective: {report['effective']:.0f}")
    lines.append(f"mean weight {weight['value']:.3f} ({weight['low']:.3f} to {weight['high']:.3f}), 1 when all is well")
    return "\n".join(
        [*lines, *(f"note: {note}" for note in result["notes"]), f"{result['checkpoint']} {result['words']}"]
    )


def _success(row: dict[str, Any], passes: str) -> list[str]:
    low, high = row[f"{passes}_interval"]
    return [f"{row[passes]:.3f}", f"{low:.3f} - {high:.3f}"]


def _gains(differences: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """What improved over what, two measures side by side: 80 columns have room for no more."""
    modes = list(dict.fromkeys(mode for passes in differences.values() for mode in passes))
    lines: list[str] = []
    for pair in (modes[i : i + 2] for i in range(0, len(modes), 2)):
        head = ["gain", *(cell for mode in pair for cell in (mode, "95 % interval"))]
        lines += aligned(
            [
                head,
                *(
                    [name, *(c for mode in pair for c in _gain(passes.get(mode)))]
                    for name, passes in differences.items()
                ),
            ]
        )
    return lines


def _gain(found: dict[str, float] | None) -> list[str]:
    return [f"{found['mean']:+.3f}", f"{found['low']:+.3f} to {found['high']:+.3f}"] if found else ["", ""]


def _occupied(folder: Path) -> list[str]:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return []
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


def _existing(folder: Path) -> None:
    from configs.paths import nothing_at

    if not folder.exists():
        raise FileNotFoundError(nothing_at(folder))


def run_folder(folder: Path) -> None:
    """``ValueError`` or ``FileNotFoundError`` unless ``folder`` is a run folder."""
    _existing(folder)
    if not (folder / RUN_CONFIG).is_file():
        raise ValueError(f"{folder} is no run folder: it has no {RUN_CONFIG}; give the folder of a run")


def _versions(text: str | None) -> tuple[int, int] | None:
    """``"0-19"`` -> (0, 19)."""
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ValueError(f"--versions is {text!r}; write the first and the last policy version, e.g. --versions 0-19")
    return int(first), int(last)


def _evaluation_config(target: Path, config: Path | None, seed: int | None) -> RunConfig | None:
    """The config that --config and --seed ask for; None leaves the choice to the evaluation."""
    from configs.loading import load_config

    own = next((f / RUN_CONFIG for f in (target, *target.parents) if (f / RUN_CONFIG).is_file()), None)
    if own is None and config is None and seed is None:
        raise ValueError(
            f"{target} is neither a run folder nor a checkpoint inside one; give one, or the task by --config CONFIG"
        )
    if config is None and seed is None:
        return None
    source = config or own
    if source is None:
        raise ValueError(f"{target} lies in no run folder, so --seed needs --config CONFIG too")
    return load_config(source, [] if seed is None else [f"seed={seed}"], check_paths=False)


@contextmanager
def sentences(code: int, resumable: Path | None = None, report_to: Report | None = None) -> Iterator[None]:
    """What users can cause ends as one sentence and ``code``; defects keep their traceback. Ctrl-C says how to go
    on."""
    from configs.loading import ConfigErrors
    from pipeline.runs.errors import RunError

    try:
        yield
    except KeyboardInterrupt as error:
        started = resumable is not None and (resumable / RUN_CONFIG).is_file()
        typer.echo(
            f"\ninterrupted; continue with: latent-control resume {resumable}" if started else "\ninterrupted", err=True
        )
        # Who sent SIGTERM (a scheduler, mostly) asked for an orderly end, and got it.
        raise typer.Exit(0 if str(error) == "SIGTERM" else INTERRUPTED) from None
    except (ValueError, ArithmeticError, OSError, RunError) as error:
        if os.environ.get(DEBUG, "") not in ("", "0"):
            raise
        # Ray hands a worker's error over with its whole traceback as text; its cause is the sentence.
        cause = getattr(error, "cause", None) or error
        hint = "" if code == USAGE else " (the traceback: latent-control --debug ...)"
        messages = cause.messages if isinstance(cause, ConfigErrors) else [_sentence(cause)]
        for message in messages:
            typer.echo(f"error: {message}{hint}", err=True)
        if report_to is not None:
            report_to.errors += messages
        if resumable is not None and (resumable / RUN_CONFIG).is_file():
            typer.echo(f"after the remedy, continue with: latent-control resume {resumable}", err=True)
        raise typer.Exit(code) from None


def _sentence(error: BaseException) -> str:
    """What an error says; the system's own have the file at the end, in quotes and numbers."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error) or type(error).__name__


def main() -> None:
    """Entry point of the installed program."""
    # Their commands join ``app``.
    from pipeline.cli import cluster as cli_cluster
    from pipeline.cli import compare as cli_evidence
    from pipeline.cli import pages as cli_explain
    from pipeline.cli import runs as cli_runs
    from pipeline.cli import search as cli_search
    from pipeline.cli import serving as cli_serving
    from pipeline.cli import steer as cli_steer
    from pipeline.cli import tasks as cli_tasks
    from pipeline.cli.panels import arrange

    parts = (cli_cluster, cli_evidence, cli_explain, cli_runs, cli_search, cli_serving, cli_steer, cli_tasks)
    assert all(module.cli.app is app for module in parts)
    arrange(app)
    try:
        app(prog_name="latent-control")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
