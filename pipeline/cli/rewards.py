"""Commands ``reward report`` and ``reward train``. Nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.options import FAILED, USAGE, AsJson, RunFolder
from pipeline.cli.output import echo, print_error, print_json, print_page, print_table
from pipeline.cli.session import exit_on_error, new_folder, run_folder, working

reward_app = typer.Typer(no_args_is_help=True, help="The parts of the reward, and reward models.")
app.add_typer(reward_app, name="reward")


@reward_app.command("report")
def reward_report(run_dir: RunFolder, as_json: AsJson = False) -> None:
    """Distribution, correlation and trend of each part of RUN's reward; flags parts that rise while success does
    not."""
    with exit_on_error(USAGE):
        folder = run_folder(run_dir)
        from pipeline.pages import reward_report as rewards

        result = rewards.report(folder)
    with exit_on_error(FAILED):
        page, not_tracked = rewards.write_page(result, folder)
    if as_json:
        print_json(result)
        return
    for name, level in result["levels"].items():
        print_table(
            f"level {name}: {level['rollouts']} rollouts of {level['updates']} updates",
            rewards.HEAD,
            rewards.table(level),
        )
        for flag in level["flags"]:
            echo(f"FLAG {rewards.sentence(flag)}")
            echo("  read: " + ", ".join(r["rollout_id"] for r in flag["rollouts"]))
            for rollout in flag["rollouts"]:
                echo(
                    f"    {' '.join(rollout['prompt_text'].split())[-60:]!r} -> "
                    f"{' '.join(rollout['text'].split())[:100]!r}"
                )
        if not level["flags"]:
            echo("no flag: no part rises while success falls or stays equal")
    print_page(page, not_tracked)


@reward_app.command("train")
def reward_train(
    pairs: Annotated[
        Path,
        typer.Argument(metavar="PAIRS", help="A .jsonl or .parquet file with prompt, chosen and rejected in each row."),
    ],
    base: Annotated[str, typer.Option("--base", help="Model to start from: a folder, a hub id, or the bundled one.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the reward model; default runs/reward-<time>.")
    ] = None,
    updates: Annotated[int, typer.Option("--updates", min=1)] = 500,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pairs per update.")] = 16,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0.0)] = 1e-5,
    max_length: Annotated[
        int, typer.Option("--max-length", min=1, help="Tokens of prompt and response, the last ones.")
    ] = 1024,
    heldout_share: Annotated[
        float, typer.Option("--heldout-share", min=0.01, max=0.99, help="Share of the prompts held out.")
    ] = 0.1,
    evaluate_every: Annotated[
        int, typer.Option("--evaluate-every", min=1, help="Updates between two evaluations on held-out pairs.")
    ] = 50,
    chat: Annotated[bool, typer.Option("--chat", help="Put texts into the base's chat template.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a preference reward model (Bradley-Terry) on pairs, for the verifier ``preference``."""
    folder = new_folder(out, "reward")
    with exit_on_error(USAGE):
        if out is not None and folder.exists():
            raise ValueError(f"--out: {folder} exists; give another folder")
        from latent_control.bases import smollm2
        from latent_control.preference import Reading
        from learners.reward_model import RewardTraining
        from pipeline.stages import reward_model

        reward_model.read_pairs(pairs, heldout_share)
        start = str(smollm2.smollm2_folder()) if base == smollm2.NAME else base
    settings = RewardTraining(
        updates=updates, batch_size=batch_size, learning_rate=learning_rate, evaluate_every=evaluate_every, seed=seed
    )
    with working():
        reading = Reading(chat=chat, max_length=max_length)
        result = reward_model.train(pairs, start, folder, settings, reading, heldout_share, say=print_error)
    if as_json:
        print_json(result | {"folder": str(folder)})
        return
    interval = f"{result['low']:.3f} - {result['high']:.3f}"
    echo(f"held-out accuracy {result['heldout_accuracy']:.3f} ({interval}) on {result['heldout_pairs']} pairs")
    echo(f"use it: task.options.verifier=preference task.options.preference={{model: {folder}}}")
