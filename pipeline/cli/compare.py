"""Commands that judge: ``reward report``, ``compare``, ``pilot``, ``tune-codes``. Nothing heavy is imported before one
runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli import app as cli

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
    """Distribution, correlation and trend of each part of RUN's reward; flags parts that rise while success does
    not."""
    folder = run_dir.absolute()
    with cli.sentences(cli.USAGE):
        cli.run_folder(folder)
        from pipeline.pages import reward_report as rewards

        result = rewards.report(folder)
    with cli.sentences(cli.FAILED):
        page, not_tracked = rewards.write_page(result, folder)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for name, level in result["levels"].items():
        print_table(
            f"level {name}: {level['rollouts']} rollouts of {level['updates']} updates",
            rewards.HEAD,
            rewards.table(level),
        )
        for flag in level["flags"]:
            typer.echo(f"FLAG {rewards.sentence(flag)}")
            typer.echo("  read: " + ", ".join(r["rollout_id"] for r in flag["rollouts"]))
            for rollout in flag["rollouts"]:
                typer.echo(
                    f"    {' '.join(rollout['prompt_text'].split())[-60:]!r} -> "
                    f"{' '.join(rollout['text'].split())[:100]!r}"
                )
        if not level["flags"]:
            typer.echo("no flag: nothing rises while success falls or stands still")
    typer.echo(f"page: {page}" + (f" (not in MLflow: {not_tracked})" if not_tracked else " (also in MLflow)"))


@cli.app.command()
def compare(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN_A RUN_B]", help="Two run folders.")] = None,
    a: Annotated[list[Path] | None, typer.Option("--a", help="A run of side A; several for several seeds.")] = None,
    b: Annotated[list[Path] | None, typer.Option("--b", help="A run of side B.")] = None,
    variant_a: Annotated[
        str, typer.Option(help="Which model of A: base, cloned, finetuned, improved, token_level.")
    ] = "improved",
    variant_b: Annotated[str, typer.Option(help="Which model of B.")] = "improved",
    html: Annotated[Path | None, typer.Option("--html", help="Default: RUN_B/compare-with-<A>.html.")] = None,
    as_json: cli.AsJson = False,
) -> None:
    """Config, success on the same held-out prompts, cost and learning curves of two runs, and a verdict with its
    interval."""
    with cli.sentences(cli.USAGE):
        left, right = _sides(runs or [], a or [], b or [])
        for folder in (*left, *right):
            cli.run_folder(folder)
        from pipeline.experiments import compare as comparison

        result = comparison.compare(left, right, (variant_a, variant_b))
    path = (html or right[-1] / f"compare-with-{left[0].name}.html").absolute()
    with cli.sentences(cli.FAILED):
        from pipeline.experiments.comparison_record import save

        saved = save(result, comparison.write_page(result, path))
    if as_json:
        typer.echo(
            json.dumps(result | {"page": str(path), "record": str(saved.record), "mlflow": saved.link}, indent=2)
        )
        return
    print_comparison(result)
    typer.echo(
        f"page: {path}" + (f" (not in MLflow: {saved.not_tracked})" if saved.not_tracked else " (also in MLflow)")
    )
    if saved.link:
        typer.echo(f"side by side in MLflow: latent-control ui {right[-1]}, then {saved.link}")


def print_comparison(result: dict[str, Any]) -> None:
    """Tables and verdict."""
    from pipeline.experiments import compare as comparison

    for table in comparison.tables(result):
        print_table(table["title"], table["head"], table["rows"])
    for note in result["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(result["verdict"])


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


@cli.app.command()
def pilot(
    prompts: Annotated[Path, typer.Option("--prompts", help="A .jsonl file, a row per prompt.")],
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="Budget of the whole pilot.")] = 60.0,
    prompt_key: Annotated[str, typer.Option("--prompt-key", help="Key of the prompt in a row.")] = "prompt",
    answers: Annotated[str, typer.Option("--answers", help="Key of the answer in a row.")] = "answer",
    verifier: Annotated[str, typer.Option("--verifier", help="exact, number, contains, regex or math.")] = "exact",
    base: Annotated[
        str, typer.Option("--base", help="Base LM: a folder, a hub id, or the bundled one.")
    ] = "smollm2-135m-instruct",
    chat: Annotated[bool, typer.Option("--chat", help="Wrap prompts in the base's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 48,
    heldout: Annotated[int, typer.Option("--heldout", min=8, help="Held-out prompts to play.")] = 256,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the result; default runs/pilot-<time>.")] = None,
    as_json: cli.AsJson = False,
) -> None:
    """Latent actions against the token level on your own rows, inside a budget: a comparison, its interval, and what to
    spend next."""
    folder = (out or Path("runs") / f"pilot-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    with cli.sentences(cli.USAGE):
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--out: {folder} is not empty; give another folder")
        from pipeline.experiments import pilot as pilots

        rows = pilots.PilotData(path=prompts.absolute(), prompt=prompt_key, answer=answers, verifier=verifier)
        model = str(Path(base).absolute()) if Path(base).is_dir() else base
        config = pilots.template(rows, model, chat=chat, max_new_tokens=max_new_tokens, heldout=heldout)
        cli.checked(pilots.written(folder / pilots.CONFIG, pilots.with_updates(config, pilots.PROBED)), [], also=[])
    # The result alone goes to stdout: it may be piped.
    with cli.sentences(cli.FAILED), redirect_stdout(sys.stderr):
        result = pilots.pilot(folder, config, minutes, say=lambda text: typer.echo(text, err=True))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    print_comparison(result)
    for line in result["advice"]:
        typer.echo(f"next: {line}")
    typer.echo(f"{result['seconds'] / 60:.1f} of {minutes:g} minutes; A is latent, B token level")
    typer.echo(f"config: {result['config']}; page: {result['page']}")


@cli.app.command("tune-codes")
def tune_codes(
    config: cli.ConfigFile,
    overrides: cli.Overrides = None,
    num_actions: Annotated[str, typer.Option("--num-actions", help="Numbers of codes to try.")] = "16,32,64,128",
    span: Annotated[str, typer.Option("--span", help="Tokens a code lasts for.")] = "1,2,4",
    temperature: Annotated[
        str, typer.Option("--temperature", help="Gumbel-softmax temperatures to start from.")
    ] = "1,2",
    layers: Annotated[
        str, typer.Option("--layers", help="Layers of inverse dynamics model and policy; empty: CONFIG's.")
    ] = "",
    trials: Annotated[int, typer.Option("--trials", min=2, help="Settings to try, CONFIG's own among them.")] = 12,
    finalists: Annotated[
        int, typer.Option("--finalists", min=1, help="How many of them reinforcement learning decides between.")
    ] = 3,
    rl_updates: Annotated[int, typer.Option("--rl-updates", min=1, help="Updates of each finalist.")] = 80,
    minutes: Annotated[float, typer.Option("--minutes", min=1.0, help="Budget of all.")] = 30.0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the result; default runs/codes-<time>.")] = None,
    as_json: cli.AsJson = False,
) -> None:
    """Search number, span and temperature of the codes for CONFIG's base LM and task; ends in a config ready to run."""
    folder = (out or Path("runs") / f"codes-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    with cli.sentences(cli.USAGE):
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--out: {folder} is not empty; give another folder")
        from pipeline.experiments import tune_codes as tune

        settings = cli.checked(config, overrides or [], also=[])
        space = tune.Space(
            num_actions=_numbers("--num-actions", num_actions, int, 2),
            span=_numbers("--span", span, int, 1),
            temperature=_numbers("--temperature", temperature, float, 0.01),
            layers=_numbers("--layers", layers, int, 1),
        )
        tune.require_stages(settings)
    # The result alone goes to stdout: it may be piped.
    with cli.sentences(cli.FAILED), redirect_stdout(sys.stderr):
        folder.mkdir(parents=True, exist_ok=True)
        result = tune.tune_codes(
            settings,
            folder,
            space=space,
            trials=trials,
            count=finalists,
            updates=rl_updates,
            minutes=minutes,
            say=lambda text: typer.echo(text, err=True),
        )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from pipeline.experiments import tune_codes_page

    print_table("codes (score: nats per token, less is better)", tune_codes_page.HEAD, tune_codes_page.rows(result))
    typer.echo(f"recommended: {tune.named(result['recommended'])}; {result['minutes']:.1f} of {minutes:g} minutes")
    typer.echo(f"run it: latent-control run {result['config']}; page: {result['page']}")


def _numbers(option: str, text: str, kind: type[int] | type[float], least: float) -> list[Any]:
    """``"16,32"`` -> [16, 32]."""
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [least - 1]
    if any(value < least for value in values):
        raise ValueError(
            f"{option} is {text!r}; write numbers of at least {least:g} with commas between them, e.g. {option} 16,32"
        )
    return values


@cli.app.command()
def sweep(
    config: cli.ConfigFile,
    overrides: cli.Overrides = None,
    tried: Annotated[
        list[str] | None, typer.Option("--try", help="A key and its values: improve.learning_rate=1e-4,5e-4. Several.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Points of the grid, drawn at random; default: all.")
    ] = None,
    metric: Annotated[
        str, typer.Option("--metric", help="success, improved.greedy, ... as in gates; or reward (RL's last 20).")
    ] = "success",
    at_once: Annotated[
        int | None, typer.Option("--at-once", min=1, help="Runs side by side; default: as the CPUs allow.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of --samples.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the runs; default runs/sweep-<time>. Again: go on.")
    ] = None,
    as_json: cli.AsJson = False,
) -> None:
    """Run CONFIG over a grid of values of any keys by Ray Tune; the same command again goes on where it was
    interrupted."""
    folder = (out or Path("runs") / f"sweep-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    with cli.sentences(cli.USAGE):
        from pipeline.experiments import sweep as sweeping

        if not tried:
            raise ValueError("nothing to try: give --try section.key=value,value")
        wanted = sweeping.choices([sweeping.parse_range(text) for text in tried], samples, seed)
        for choice in wanted:  # every point is a config of its own, and may be wrong alone
            cli.checked(config, [*(overrides or []), *sweeping.overrides(choice)], also=[])
        trials = sweeping.planned(config, overrides or [], wanted, folder)
        configs = {trial.name: sweeping.trial_config(config, overrides or [], trial, folder.name) for trial in trials}
    with cli.sentences(cli.FAILED), redirect_stdout(sys.stderr):
        result = sweeping.sweep(
            configs, trials, folder, metric=metric, at_once=at_once, say=lambda text: typer.echo(text, err=True)
        )
    if as_json:
        typer.echo(
            json.dumps({"folder": str(folder), "metric": metric, "trials": [vars(trial) for trial in result]}, indent=2)
        )
    else:
        head, rows = sweeping.table(result, metric)
        print_table(f"{folder}, best first", head, rows)
    if failed := [trial for trial in result if trial.error]:
        typer.echo(
            f"{len(failed)} of {len(result)} runs failed; the same command with --out {folder} resumes them", err=True
        )
        raise typer.Exit(cli.FAILED)
