"""Commands ``tune-codes`` and ``sweep``. Nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE, AsJson, ConfigFile, Overrides
from pipeline.cli.output import echo, print_error, print_json, print_table
from pipeline.cli.session import checked, empty_folder, exit_on_error, new_folder, working


@app.command("tune-codes")
def tune_codes(
    config: ConfigFile,
    overrides: Overrides = None,
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
        int, typer.Option("--finalists", min=1, help="Settings that reinforcement learning decides between.")
    ] = 3,
    rl_updates: Annotated[
        int, typer.Option("--rl-updates", min=1, help="Updates of each finalist, with each of two seeds.")
    ] = 80,
    minutes: Annotated[float, typer.Option("--minutes", min=1.0, help="Budget of all.")] = 30.0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the result; default runs/codes-<time>.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search number, span and temperature of the codes for CONFIG's base LM and task; ends in a config ready to run."""
    with exit_on_error(USAGE):
        folder = empty_folder(out, "codes")
        from pipeline.experiments import tune_codes as tune

        settings = checked(config, overrides or [], also=[])
        space = tune.Space(
            num_actions=_numbers("--num-actions", num_actions, int, 2),
            span=_numbers("--span", span, int, 1),
            temperature=_numbers("--temperature", temperature, float, 0.01),
            layers=_numbers("--layers", layers, int, 1),
        )
        tune.require_stages(settings)
    with working():
        folder.mkdir(parents=True, exist_ok=True)
        result = tune.tune_codes(
            settings,
            folder,
            space=space,
            trials=trials,
            count=finalists,
            updates=rl_updates,
            minutes=minutes,
            say=print_error,
        )
    if as_json:
        print_json(result)
        return
    from pipeline.experiments import tune_codes_page

    print_table("codes (score: nats per token, less is better)", tune_codes_page.HEAD, tune_codes_page.rows(result))
    echo(result["verdict"])
    echo(f"recommended: {tune.named(result['recommended'])}; {result['minutes']:.1f} of {minutes:g} minutes")
    echo(f"run it: latent-control run {result['config']}; page: {result['page']}")


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


@app.command()
def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
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
        Path | None, typer.Option("--out", help="Folder of the runs; default runs/sweep-<time>. Again: resume.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run CONFIG over a grid of values of any keys by Ray Tune; the same command resumes it after an
    interruption."""
    folder = new_folder(out, "sweep")
    with exit_on_error(USAGE):
        from pipeline.experiments import sweep as sweeping

        if not tried:
            raise ValueError("nothing to try: give --try section.key=value,value")
        wanted = sweeping.choices([sweeping.parse_range(text) for text in tried], samples, seed)
        for choice in wanted:  # every point is a separate config with problems of its own
            point = checked(config, [*(overrides or []), *sweeping.overrides(choice)], also=[])
            sweeping.require_metric(point, metric)
        trials = sweeping.planned(config, overrides or [], wanted, folder)
        configs = {trial.name: sweeping.trial_config(config, overrides or [], trial, folder.name) for trial in trials}
    with working():
        result = sweeping.sweep(configs, trials, folder, metric=metric, at_once=at_once, say=print_error)
    if as_json:
        print_json({"folder": str(folder), "metric": metric, "trials": [vars(trial) for trial in result]})
    else:
        head, rows = sweeping.table(result, metric)
        print_table(f"{folder}, best first", head, rows)
    if failed := [trial for trial in result if trial.error]:
        print_error(f"{len(failed)} of {len(result)} runs failed; the same command with --out {folder} resumes them")
        raise typer.Exit(FAILED)
