"""Commands ``task check``, ``init`` and ``sample``. Nothing heavy is imported before one runs."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE, AsJson, ConfigFile, Overrides
from pipeline.cli.output import echo, print_error, print_json, print_table
from pipeline.cli.session import exit_on_error, prospect
from pipeline.console.progress import clock
from pipeline.runs.layout import CONFIG
from pipeline.runs.stage_table import ACTIONS, CLONE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from configs.schema import RunConfig, TaskConfig

QUICK = 10_000_000
"""Parameters of a base LM that needs no forecast."""
task_app = typer.Typer(no_args_is_help=True, help="Prompts and their verifier.")
app.add_typer(task_app, name="task")


@task_app.command("check")
def task_check(
    target: Annotated[
        str, typer.Argument(metavar="NAME_OR_CONFIG", help="A task's name, e.g. reasoning_gym/gcd, or a YAML file.")
    ],
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("--prompts", min=1, help="Held-out prompts to answer.")] = 32,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random answers.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Score gold, foreign, scrambled and odd answers: timing, determinism, score ranges. Exit code 1 if there is a
    problem, 2 if ``config check`` would refuse the task."""
    with exit_on_error(USAGE), redirect_stdout(sys.stderr):
        from pipeline.preflight import task_check as checking

        result = checking.check(*_task(target, overrides or []), count=count, seed=seed)
    if as_json:
        print_json(result)
    else:
        sizes = ", ".join(
            f"{s['prompts']} {name} prompts ({s['ms_per_prompt']:.2f} ms each)" for name, s in result["splits"].items()
        )
        echo(f"{result['task']}: {sizes}; parts {', '.join(result['parts'])}; built in {result['build_seconds']:.1f} s")
        print_table("answers to held-out prompts", checking.HEAD, checking.table(result))
        for kind in ("warnings", "problems", "errors"):
            for line in result[kind]:
                echo(f"{kind[:-1]}: {line}")
        wrong = len(result["problems"]) + len(result["errors"])
        echo(f"{wrong} problems" if wrong else "ok")
    if result["errors"] or result["problems"]:
        raise typer.Exit(USAGE if result["errors"] else FAILED)


@app.command()
def init(
    rows: Annotated[
        Path,
        typer.Argument(
            metavar="ROWS", help="A file of rows (.jsonl, .json, .csv, .parquet ...), a folder, a data set."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="CONFIG", help="The config to write.")] = Path(CONFIG),
    base: Annotated[
        str, typer.Option("--base", help="Base LM: a folder, a hub id, or the bundled one.")
    ] = "smollm2-135m-instruct",
    prompt_key: Annotated[
        str | None, typer.Option("--prompt-key", help="Key of the prompt; default: found by its name.")
    ] = None,
    answer_key: Annotated[
        str | None, typer.Option("--answer-key", help="Key of the answer; default: found by its name.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap prompts in the base's chat template.")] = False,
) -> None:
    """Write a config for your own rows: keys, verifier, lengths and slices read off them, usual settings for the
    rest."""
    with exit_on_error(USAGE):
        if out.exists():
            raise ValueError(f"{out} exists already; give another name with -o")
        from pipeline.preflight import init_config

        found = init_config.look(rows.absolute(), prompt_key, answer_key, chat=chat)
        model = str(Path(base).absolute()) if Path(base).is_dir() else base
        config = init_config.config_of(found, _tokenizer(model), base=model, out=out.absolute())
        out.write_text(init_config.text_of(found, config), encoding="utf-8")
        seconds = _seconds(out)
        if (fitting := init_config.sized(config, seconds)) != config:
            out.write_text(init_config.text_of(found, fitting), encoding="utf-8")
            echo(f"fewer updates than usual, for on this machine the run would take {clock(sum(seconds.values()))}")
    options = found.task.options
    echo(
        f"{out}: {found.rows} rows, prompt {options['prompt']!r}, answer {options['answer']!r} judged by "
        f"{options['verifier']!r}" + (f"; not shown to the model: {', '.join(found.unused)}" if found.unused else "")
    )
    echo(f"next: latent-control task check {out}; latent-control sample {out}; latent-control run {out}")


def _seconds(out: Path) -> dict[str, float]:
    """How long the stages of a new config take here; nothing for a base LM that is quick everywhere. Its samples are
    yet to be made: rows stand in for them."""
    from configs.loading import load_config
    from pipeline.preflight.number_type import parameters_of

    config = load_config(out, [f"{name}.data=[{{kind: task}}]" for name in (ACTIONS, CLONE)], check_paths=False)
    return prospect(config).seconds if parameters_of(config) > QUICK else {}


@app.command()
def sample(
    config: ConfigFile,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Responses to each training prompt.")] = 64,
    prompts: Annotated[
        int | None,
        typer.Option("--prompts", min=1, help="Only the first N training prompts, else at most 100,000."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Default: beside CONFIG, its name with -samples.")
    ] = None,
) -> None:
    """The base LM's own responses to CONFIG's training prompts, as rows to learn the codebook from."""
    from pipeline.preflight.init_config import samples_of

    file = (out or samples_of(config)).absolute()
    with exit_on_error(USAGE):
        if file.suffix not in (".jsonl", ".ndjson"):
            raise ValueError(f"-o: {file.name} would not be read as the JSON lines that it holds; end it with .jsonl")
        if file.exists():
            raise ValueError(f"{file} exists already; remove it, or give another name with -o")
        from configs.loading import load_config
        from configs.schema import Improve

        # The file to be made may be one that the config names.
        settings = load_config(config, overrides or [], check_paths=False)
    with exit_on_error(FAILED):
        from pipeline.experiments import sample_base

        found = sample_base.sample(settings, file, samples, print_error, prompts)
    for line in found.words():
        print_error(line)
    echo(f"{file}: {len(found.rows)} rows from {found.prompts} prompts; the base LM's success is {found.success_text}")
    if found.failed > (settings.improve or Improve()).max_failed_share * found.responses:
        print_error("error: improve would stop for that: mend the verifier; the rows can be used all the same")
        raise typer.Exit(FAILED)


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Of the base LM at ``model``."""
    from configs.schema import Base, RunConfig
    from pipeline.preflight.base_model import Unreachable, base_config_and_tokenizer

    try:
        return base_config_and_tokenizer(RunConfig(base=Base(model=model)))[1]
    except Unreachable as error:
        raise ValueError(f"--base: {error}") from error


def _task(target: str, overrides: list[str]) -> tuple[TaskConfig, RunConfig | None]:
    """The task of a config file, and that, or the task of that name; overrides are ``task.options.key=value`` for
    both."""
    from configs.loading import load_config, load_task
    from configs.paths import packaged_config

    if target.endswith((".yaml", ".yml")) or packaged_config(Path(target)) is not None:
        run = load_config(target, overrides, check_paths=False)
        return run.task, run
    return load_task(target, overrides, Path.cwd()), None
