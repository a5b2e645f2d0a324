"""Commands ``compare`` and ``pilot``. Nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE, AsJson, Overrides
from pipeline.cli.output import echo, print_error, print_json, print_page, print_table
from pipeline.cli.session import checked, empty_folder, exit_on_error, run_folder, working


@app.command()
def compare(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN_A RUN_B]", help="Two run folders.")] = None,
    a: Annotated[list[Path] | None, typer.Option("--a", help="A run of side A; repeat it for several seeds.")] = None,
    b: Annotated[list[Path] | None, typer.Option("--b", help="A run of side B.")] = None,
    variant_a: Annotated[
        str, typer.Option(help="Which model of A: base, cloned, finetuned, offline, improved, token_sft, token_level.")
    ] = "improved",
    variant_b: Annotated[str, typer.Option(help="Which model of B.")] = "improved",
    html: Annotated[Path | None, typer.Option("--html", help="Default: RUN_B/compare-with-<A>.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Config, success on the same held-out prompts, cost and learning curves of two runs, and a verdict with its
    interval."""
    with exit_on_error(USAGE):
        left, right = _sides(runs or [], a or [], b or [])
        for folder in (*left, *right):
            run_folder(folder)
        from pipeline.experiments import compare as comparison

        result = comparison.compare(left, right, (variant_a, variant_b))
    path = (html or right[-1] / f"compare-with-{left[0].name}.html").absolute()
    with exit_on_error(FAILED):
        from pipeline.experiments.comparison_page import write_page
        from pipeline.experiments.comparison_record import save

        saved = save(result, write_page(result, path))
    if as_json:
        print_json(result | {"page": str(path), "record": str(saved.record), "mlflow": saved.link})
        return
    print_comparison(result)
    print_page(path, saved.not_tracked)
    if saved.link:
        echo(f"side by side in MLflow: latent-control ui {right[-1]}, then {saved.link}")


def print_comparison(result: dict[str, Any]) -> None:
    """Print the tables, notes and verdict of a comparison."""
    from pipeline.experiments.comparison_page import terminal_tables

    for table in terminal_tables(result):
        texts = [place for place, _ in enumerate(table.head) if all(isinstance(row[place], str) for row in table.rows)]
        kept = [[str(row[place]) for place in texts] for row in table.rows]
        print_table(table.title, [table.head[place] for place in texts], kept)
    for note in result["notes"]:
        echo(f"note: {note}")
    echo(result["verdict"])


def _sides(runs: list[Path], a: list[Path], b: list[Path]) -> tuple[list[Path], list[Path]]:
    if runs and (a or b):
        raise ValueError("give two run folders, or --a and --b, not both")
    if not runs and not (a and b):
        raise ValueError("give two run folders, RUN_A RUN_B, or several a side: --a RUN --a RUN --b RUN --b RUN")
    if runs and len(runs) != 2:
        raise ValueError(
            f"{len(runs)} run folder{'s' * (len(runs) != 1)} given: give two, or several a side by --a and --b"
        )
    left, right = (runs[:1], runs[1:]) if runs else (a, b)
    return [path.absolute() for path in left], [path.absolute() for path in right]


@app.command()
def pilot(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="A YAML file, whose task, base LM and settings are tried as they are."),
    ] = None,
    overrides: Overrides = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="In place of CONFIG: a file of rows, one per prompt.")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="Budget of the whole pilot.")] = 60.0,
    prompt_key: Annotated[str, typer.Option("--prompt-key", help="Key of the prompt in a row.")] = "prompt",
    answers: Annotated[str, typer.Option("--answers", help="Key of the answer in a row.")] = "answer",
    verifier: Annotated[
        str, typer.Option("--verifier", help="exact, number, contains, regex, math, or FILE.py:FUNCTION.")
    ] = "exact",
    base: Annotated[
        str, typer.Option("--base", help="Base LM: a folder, a hub id, or the bundled one.")
    ] = "smollm2-135m-instruct",
    chat: Annotated[bool, typer.Option("--chat", help="Wrap prompts in the base's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 48,
    heldout: Annotated[int, typer.Option("--heldout", min=8, help="Number of held-out prompts.")] = 256,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the result; default runs/pilot-<time>.")] = None,
    as_json: AsJson = False,
) -> None:
    """Latent actions against the token level on your own rows, inside a budget: a comparison, its interval, and what to
    spend next."""
    with exit_on_error(USAGE):
        folder = empty_folder(out, "pilot")
        from pipeline.experiments import pilot as pilots

        if (config is None) == (prompts is None):
            raise ValueError("give a config, or rows by --prompts FILE, and not both")
        if config is not None:
            from configs.loading import load_config

            # Codes are found on the pilot's own samples, whatever file of samples the config names.
            wanted = pilots.template_of(load_config(config, overrides or [], check_paths=False))
        else:
            assert prompts is not None
            rows = pilots.PilotData(path=prompts.absolute(), prompt=prompt_key, answer=answers, verifier=verifier)
            model = str(Path(base).absolute()) if Path(base).is_dir() else base
            wanted = pilots.template(rows, model, chat=chat, max_new_tokens=max_new_tokens, heldout=heldout)
        checked(pilots.written(folder / pilots.CONFIG, pilots.with_updates(wanted, pilots.PROBED)), [], also=[])
    with working():
        result = pilots.pilot(folder, wanted, minutes, say=print_error)
    if as_json:
        print_json(result)
        return
    print_comparison(result)
    for line in result["advice"]:
        echo(f"next: {line}")
    echo(f"{result['seconds'] / 60:.1f} of {minutes:g} minutes; A is latent, B token level")
    echo(f"config: {result['config']}; page: {result['page']}")
