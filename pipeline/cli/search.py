"""Commands ``search`` and ``train-q``. Nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.app import app
from pipeline.cli.options import USAGE, AsJson
from pipeline.cli.output import echo, print_error, print_json, print_table
from pipeline.cli.session import existing, exit_on_error, run_folder, working
from pipeline.runs.layout import CHECKPOINTS


@app.command()
def search(
    target: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder (its last policy), or a checkpoint in one."),
    ],
    method: Annotated[Literal["best-of-n", "mcts", "mcts-q"], typer.Option("--method", help="How to search.")] = "mcts",
    iterations: Annotated[
        int, typer.Option("--iterations", min=1, help="Leaves grown per prompt; of best-of-n, responses.")
    ] = 64,
    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Tokens of a tree's edge.")] = 4,
    c: Annotated[float, typer.Option("--c", min=0.0, help="Weight of exploration in UCT.")] = 0.7,
    width: Annotated[int, typer.Option("--width", min=1, help="Chunks drawn from a leaf at a time.")] = 4,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Held-out prompts.")] = 64,
    value: Annotated[
        Literal["verifier", "q"], typer.Option("--value", help="What responses are valued by.")
    ] = "verifier",
    q: Annotated[Path | None, typer.Option("--q", help="Checkpoint of train-q: for mcts-q, and for --value q.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of all rows but greedy; default: the run's.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Default: the run's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search over latent actions on held-out prompts, beside greedy, sampled, and best-of-n with as many generated
    tokens."""
    with exit_on_error(USAGE):
        target, q = existing(target), existing(q) if q else None
        from pipeline.experiments import search as searching

        asked = searching.SearchOptions(
            method=method,
            iterations=iterations,
            chunk=chunk,
            c=c,
            width=width,
            prompts=prompts,
            value=value,
            temperature=temperature,
            seed=seed,
        )
        table = searching.prepare(target, asked, q)
    with working():
        result = searching.play(table, asked)
        kept = searching.record(table, result)
    if as_json:
        print_json(result)
        return
    from pipeline.experiments import search_table

    print_table(search_table.title(result), search_table.HEAD, search_table.cells(result))
    for line in [*search_table.sentences(result), f"kept: {kept}"]:
        echo(line)


@app.command("train-q")
def train_q(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with a replay buffer.")],
    out: Annotated[Path | None, typer.Option("--out", help="The checkpoint; default RUN/checkpoints/q_head.")] = None,
    updates: Annotated[int, typer.Option("--updates", min=1)] = 2000,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rollouts of an update.")] = 128,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 1e-3,
    hidden: Annotated[int, typer.Option("--hidden", min=0, help="Inner width of the head; 0: linear.")] = 256,
    discount: Annotated[float, typer.Option("--discount", help="Per code.")] = 1.0,
    support: Annotated[
        float,
        typer.Option("--support", help="Codes below this share of the largest probability are excluded."),
    ] = 0.1,
    target_every: Annotated[
        int, typer.Option("--target-every", min=1, help="Updates between copies to the target network.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a Q head on RUN's stored rollouts by double DQN, for search with mcts-q or --value q."""
    with exit_on_error(USAGE):
        folder = run_folder(run_dir)
        path = (out or folder / CHECKPOINTS / "q_head").absolute()
        if path.exists() and not (path / "q_head.json").is_file():
            raise ValueError(f"--out: {path} exists and holds no Q head; give another folder")
        from learners.q_head import QSettings
        from pipeline.stages import q_head

        settings = QSettings(
            updates=updates,
            batch_size=batch_size,
            learning_rate=learning_rate,
            hidden=hidden,
            discount=discount,
            support=support,
            target_every=target_every,
        )
    with working():
        result = q_head.train_q(folder, path, settings, seed=seed, say=print_error)
    if as_json:
        print_json(result)
        return
    found = result["measures"]
    shown = ", ".join(
        f"{name} {found[name]:.3f}"
        for name in ("auc_first", "auc_middle", "auc_last", "auc_taken")
        if found[name] is not None
    )
    echo(
        f"{result['rollouts']} rollouts, {result['seconds']:.0f} s; on {result['heldout_rollouts']} of "
        f"held-out prompts: {shown}"
    )
    echo(f"use it: latent-control search {run_dir} --method mcts-q --q {path}")
