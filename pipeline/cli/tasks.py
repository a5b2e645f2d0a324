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
from pipeline.cli.session import exit_on_error
from pipeline.runs.layout import CONFIG

if TYPE_CHECKING:
    from configs.schema import Task

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
    problem."""
    with exit_on_error(USAGE), redirect_stdout(sys.stderr):
        from pipeline.preflight import task_check as checking

        result = checking.check(_task(target, overrides or []), count, seed)
    if as_json:
        print_json(result)
    else:
        sizes = ", ".join(
            f"{s['prompts']} {name} prompts ({s['ms_per_prompt']:.2f} ms each)" for name, s in result["splits"].items()
        )
        echo(f"{result['task']}: {sizes}; parts {', '.join(result['parts'])}; built in {result['build_seconds']:.1f} s")
        print_table("answers to held-out prompts", checking.HEAD, checking.table(result))
        for kind in ("warnings", "problems"):
            for line in result[kind]:
                echo(f"{kind[:-1]}: {line}")
        echo("ok" if not result["problems"] else f"{len(result['problems'])} problems")
    if result["problems"]:
        raise typer.Exit(FAILED)


@app.command()
def init(
    rows: Annotated[
        Path, typer.Argument(metavar="ROWS", help="A .jsonl or .parquet file with a prompt and an answer in each row.")
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
    """Write a config for your own rows: keys, verifier, lengths and slices read off them, the rest as in the
    quickstart."""
    with exit_on_error(USAGE):
        if out.exists():
            raise ValueError(f"{out} exists already; give another name with -o")
        from pipeline.preflight import init_config

        found = init_config.look(rows.absolute(), prompt_key, answer_key)
        model = str(Path(base).absolute()) if Path(base).is_dir() else base
        tokens = _tokens(model, found.longest)
        config = init_config.config_of(found, base=model, chat=chat, tokens=tokens, out=out.absolute())
        out.write_text(init_config.text_of(found, config), encoding="utf-8")
    echo(f"{out}: {found.rows} rows, prompt {found.prompt!r}, answer {found.answer!r} judged by {found.verifier!r}")
    echo(f"next: latent-control task check {out}; latent-control sample {out}; latent-control run {out}")


@app.command()
def sample(
    config: ConfigFile,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Responses to each training prompt.")] = 64,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Default: beside CONFIG, its name with -samples.")
    ] = None,
) -> None:
    """The base LM's own responses to CONFIG's training prompts, as rows to learn the codebook from."""
    from pipeline.preflight.init_config import samples_of

    file = (out or samples_of(config)).absolute()
    with exit_on_error(USAGE):
        if file.exists():
            raise ValueError(f"{file} exists already; remove it, or give another name with -o")
        from configs.loading import load_config

        # The file to be made may be one that the config names.
        settings = load_config(config, overrides or [], check_paths=False)
    with exit_on_error(FAILED):
        from pipeline.experiments import sample_base

        found = sample_base.sample(settings, file, samples, print_error)
    echo(
        f"{file}: {found['rows']:g} rows from {found['prompts']:g} prompts; the base LM's success is "
        f"{found['success']:.3f}"
    )


def _tokens(model: str, text: str) -> int:
    """Tokens of ``text`` for the base LM at ``model``, its end token included."""
    from configs.schema import Base, RunConfig
    from pipeline.preflight.base_model import Unreachable, base_config_and_tokenizer

    try:
        _, tokenizer = base_config_and_tokenizer(RunConfig(base=Base(model=model)))
    except Unreachable as error:
        raise ValueError(f"--base: {error}") from error
    return len(tokenizer(text)["input_ids"]) + 1


def _task(target: str, overrides: list[str]) -> Task:
    """The task of a config file, or the one of that name; overrides are ``task.options.key=value`` for both."""
    from configs.loading import load_config, load_task

    if target.endswith((".yaml", ".yml")):
        return load_config(target, overrides, check_paths=False).task
    return load_task(target, overrides, Path.cwd())
