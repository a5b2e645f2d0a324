"""Commands ``evaluate``, ``gateway`` and ``off-policy``. Nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.app import app
from pipeline.cli.options import USAGE, AsJson
from pipeline.cli.output import gateway_words, off_policy_table, pass_gates, print_result, result_table
from pipeline.cli.session import existing, exit_on_error, working
from pipeline.runs.layout import CONFIG

if TYPE_CHECKING:
    from configs.schema import RunConfig


# Names of latent_control.off_policy.ESTIMATORS, which the command line does not import.
Estimator = Literal["ips", "wis", "dr", "wdr"]


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A run folder or a checkpoint folder.")],
    prompts: Annotated[int | None, typer.Option("--prompts", min=1, help="Number of held-out prompts.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Use this config's task and rollout settings, not the run's.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the sampled pass.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run's models, or one checkpoint, on held-out prompts. Exit code 3 when a gate of the config
    fails."""
    with exit_on_error(USAGE):
        target = existing(target)
        settings = _evaluation_config(target, config, seed)
        from pipeline.stages.evaluate import evaluate as evaluate_target
    with working():
        result = evaluate_target(target, config=settings, prompts=prompts)
    print_result(result, result_table, as_json)
    pass_gates(result.get("gates"), quiet=as_json)


@app.command()
def gateway(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="A run (its last policy), or RUN/checkpoints/STAGE.")],
    program: Annotated[
        Path | None, typer.Option("--program", metavar="FILE", help="The agent program; default: that of RUN's task.")
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="The first episodes of the split.")] = 8,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Rollouts of each episode.")] = 1,
    split: Annotated[Literal["train", "heldout"], typer.Option("--split")] = "heldout",
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the most likely codes.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the sampled codes; default: RUN's.")] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FOLDER", help="Where the rollouts are added (Parquet).")
    ] = Path("gateway-rollouts"),
    as_json: AsJson = False,
) -> None:
    """Let an agent program play with RUN's policy over OpenAI's protocol, and record its episodes as rollouts."""
    with exit_on_error(USAGE):
        target = existing(target)
        from pipeline.experiments.gateway import play_program

        if program is not None and not program.is_file():
            raise ValueError(f"--program: {program} does not exist; name the agent program's file")
    with working():
        result = play_program(
            target,
            program,
            episodes=episodes,
            samples=samples,
            split=split,
            greedy=greedy,
            seed=seed,
            out=out.absolute(),
        )
    print_result(result, gateway_words, as_json)


@app.command("off-policy")
def off_policy(
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="A checkpoint folder, or a run folder: then its last policy.")
    ],
    replay: Annotated[
        list[Path], typer.Option("--replay", help="A run folder with rollouts of other policies; may be repeated.")
    ],
    last_updates: Annotated[
        int | None, typer.Option("--last-updates", min=1, help="Only rollouts of the last N updates.")
    ] = None,
    versions: Annotated[
        str | None, typer.Option("--versions", metavar="FIRST-LAST", help="Only rollouts of these policies.")
    ] = None,
    estimator: Annotated[Estimator, typer.Option("--estimator", help="Decides the verdict.")] = "dr",
    at_least: Annotated[
        float | None,
        typer.Option("--at-least", help="Reward that the lower bound must reach; default: the behaviour's."),
    ] = None,
    weight_cap: Annotated[
        float | None, typer.Option("--weight-cap", min=1.0, help="Truncate weights at this value.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a policy's reward from other policies' rollouts, without sampling: may it go online?"""
    with exit_on_error(USAGE):
        target, replay = existing(target), [existing(folder) for folder in replay]
        window = _versions(versions)
        from pipeline.experiments.off_policy import judge
    with working():
        result = judge(
            target,
            replay,
            last_updates=last_updates,
            versions=window,
            weight_cap=weight_cap,
            estimator=estimator,
            at_least=at_least,
        )
    print_result(result, off_policy_table, as_json)


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

    own = next((f / CONFIG for f in (target, *target.parents) if (f / CONFIG).is_file()), None)
    if own is None and config is None and seed is None:
        raise ValueError(
            f"{target} is neither a run folder nor a checkpoint inside one; give one, or the task by --config CONFIG"
        )
    if config is None and seed is None:
        return None
    source = config or own
    if source is None:
        raise ValueError(f"{target} is not inside a run folder, so --seed needs --config CONFIG too")
    return load_config(source, [] if seed is None else [f"seed={seed}"], check_paths=False)
