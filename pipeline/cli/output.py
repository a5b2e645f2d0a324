"""What commands print: tables, plans, verdicts, errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from configs.plain_text import escaped
from configs.redaction import without_secrets
from pipeline.cli.options import GATES
from pipeline.evaluation.modes import MODES, greedy_words, rollout_words
from pipeline.runs.layout import EXPLORER, REPORT
from pipeline.runs.stage_table import ACTIONS, EVALUATE, TOKEN_SFT, Stage, level_of, planned
from pipeline.runs.summary import collapse_words, read_summary

if TYPE_CHECKING:
    from configs.schema import RunConfig


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a text, whoever it quotes: what would steer the terminal is shown escaped, secrets not at all."""
    typer.echo(escaped(without_secrets(text)), err=err, nl=nl)


def print_error(text: str) -> None:
    """A line to stderr."""
    echo(text, err=True)


def print_json(data: Any) -> None:
    """What ``--json`` prints."""
    echo(json.dumps(data, indent=2))


def print_result(result: dict[str, Any], as_text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """A result as JSON or as text."""
    echo(json.dumps(result, indent=2) if as_json else as_text(result))


def print_page(path: Path, not_tracked: str | None) -> None:
    """Where a page is, and whether MLflow has it too; ``not_tracked``: why it has not."""
    echo(f"page: {path}" + (f" (not in MLflow: {not_tracked})" if not_tracked else " (also in MLflow)"))


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, drop: bool = False) -> None:
    """A rich table, as wide as it needs to be where output is not a terminal. ``drop``: where it is too wide for one,
    its last columns are left out, and named, rather than letters of all."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    kept = len(head) if not drop else fitting(head, rows, console.width)
    # Text: in a plain string rich would take brackets for markup.
    table = Table(*head[:kept], title=Text(escaped(title)), title_justify="left")
    for row in rows:
        table.add_row(*(Text(escaped(cell)) for cell in row[:kept]))
    console.print(table)
    if kept < len(head):
        echo(f"left out at {console.width} columns: {', '.join(head[kept:])}")


def fitting(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> int:
    """How many columns of a table, two at least, stand whole side by side in ``width`` characters."""
    from rich.cells import cell_len

    widths = [3 + max(cell_len(escaped(cell)) for cell in column) for column in zip(head, *rows, strict=True)]
    return max([2, *(count for count in range(3, len(head) + 1) if 1 + sum(widths[:count]) <= width)])


def print_problems(path: Path, errors: list[str], warnings: list[str]) -> None:
    """Warnings and errors to stderr, one line each."""
    for warning in warnings:
        print_error(f"warning: {warning}")
    if errors:
        print_error(f"{path}: {len(errors)} {'error' if len(errors) == 1 else 'errors'}, nothing was started")
        for error in errors:
            print_error(f"  - {error}")


def plan(config: RunConfig, begun: Collection[str] = ()) -> Iterator[str]:
    """One line for each stage that will run, or, of a run that has ``begun`` some, is there."""
    for stage in planned(config, begun):
        yield f"  {stage.name:9} {_stage_line(config, stage)}"
    if config.evaluation is not None:
        yield f"  {EVALUATE:9} up to {config.evaluation.prompts} held-out prompts of {config.task.name}"
    learners = (
        f"{config.cluster.num_learners} learner actors" if config.cluster.num_learners else "the learner in the driver"
    )
    yield f"  ray       {config.cluster.address}: {config.rollout.num_workers} rollout workers, {learners}"


def _stage_line(config: RunConfig, stage: Stage) -> str:
    section = stage.settings(config)
    if stage.online:
        return (
            f"{section.updates} {section.algorithm} updates of {section.prompts_per_update} prompts x "
            f"{section.group_size} rollouts, {level_of(config, stage.name)} level, {section.mode}"
        )
    data = " + ".join(source.kind for source in section.data)
    more = f", {section.num_actions} codes" if stage.name == ACTIONS else ""
    more += ", the base LM alone, as finetune: the token level starts from it" if stage.name == TOKEN_SFT else ""
    return f"{section.updates} updates of {section.batch_size} sequences ({data}){more}"


def finish(run_dir: Path, quiet: bool, as_json: bool = False) -> None:
    """Print the end of a run, then the gates."""
    if not (quiet or as_json):
        echo(closing_words(run_dir))
    pass_gates(read_summary(run_dir).get("gates"), quiet or as_json)


def pass_gates(gates: dict[str, Any] | None, quiet: bool) -> None:
    """Each gate's verdict with its value, the failed ones to stderr; exits with 3 when one failed."""
    for verdict in gates["verdicts"] if gates else ():
        found = "not measured" if verdict["value"] is None else f"{verdict['value']:.4g}"
        word = "passed" if verdict["passed"] else "FAILED"
        if not (quiet and verdict["passed"]):
            echo(f"gate {word}: {verdict['gate']}  ({verdict['variant']}: {found})", err=not verdict["passed"])
    if gates and not gates["passed"]:
        raise typer.Exit(GATES)


def closing_words(run_dir: Path) -> str:
    """The end of a run: its evaluation as a table, its folder, and the commands and pages that show it."""
    summary = read_summary(run_dir)
    table = f"{result_table(summary['evaluation'])}\n" if "evaluation" in summary else ""
    lost = [summary["tracking"]] if summary.get("tracking") else []
    said = [*collapse_words(summary), *summary.get("warnings", []), *lost]
    warnings = "".join(f"{line}\n" for line in said)
    pages = "".join(
        f"\n{words}: {run_dir / page}"
        for words, page in (("what the codes do", EXPLORER), ("all of it on one page", REPORT))
        if (run_dir / page).is_file()
    )
    return f"{table}{warnings}run folder: {run_dir}\nlearning curves: latent-control ui {run_dir}{pages}"


def result_table(result: dict[str, Any]) -> str:
    """An evaluation as aligned text: success of each model with its 95 % interval, then what improved over what."""
    rows = {name: value for name, value in result.items() if isinstance(value, dict) and "greedy" in value}
    table = [
        ["success", "sampled", "95 % interval", "greedy", "95 % interval", "tokens"],
        *(
            [name, *_success(row, "sampled"), *_success(row, "greedy"), f"{row['sampled_tokens']:.1f}"]
            for name, row in rows.items()
        ),
    ]
    parts = (_by_token(rows), _gains(result.get("differences", {})), _more(rows), _slice_lines(rows))
    lines = [*aligned(table), *(line for part in parts for line in part)]
    return "\n".join([*lines, "; ".join([rollout_words(result), *greedy_words(result)])])


def _by_token(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Latent policies, greedy by token: a separate table, 80 columns have room for no more."""
    measured = {name: row for name, row in rows.items() if "greedy_token" in row}
    head = ["greedy by token", "success", "95 % interval", "seconds"]
    cost = {n: f"{r['greedy_token_cost']:.2f} x" if r.get("greedy_token_cost") else "" for n, r in measured.items()}
    body = [[name, *_success(row, "greedy_token"), cost[name]] for name, row in measured.items()]
    return aligned([head, *body]) if body else []


# Shown below the table, where measured: name in the evaluation, format.
SHOWN: tuple[tuple[str, str], ...] = (
    ("semantic_diversity", ".3f"),
    ("distinct_2", ".3f"),
    ("differing_pairs_successful", ".3f"),
    ("nll", ".3f"),
    ("nll_rise", "+.3f"),
    ("kl_to_base", ".3f"),
    ("policy_code_perplexity", ".1f"),
    ("policy_alive_codes", ".0f"),
    ("inverse_dynamics_code_perplexity", ".1f"),
    ("coverage", ".3f"),
)


def _more(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line for each other measure: its value for every variant that has it."""
    passes = sorted(
        {key for row in rows.values() for key in row if key.startswith("pass_at_") and not key.endswith("_interval")},
        key=lambda name: int(name.removeprefix("pass_at_")),
    )
    for key, form in (*((key, ".3f") for key in passes), *SHOWN):
        values = [f"{name} {row[key]:{form}}" for name, row in rows.items() if row.get(key) is not None]
        if values:
            yield f"{key}: {', '.join(values)}"


def _slice_lines(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The largest gap of every variant by field, sampled."""
    for name, row in rows.items():
        for field, gaps in row.get("slice_gaps", {}).items():
            if (gap := gaps["sampled"]) is not None:
                yield (
                    f"slice_gap of {name} by {field}: {gap['gap']:.3f} ({gap['low']:.3f} to {gap['high']:.3f}; by "
                    f"chance below {gap['by_chance']:.3f}), best {gap['largest']}, worst {gap['smallest']}"
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
    lines = [
        *aligned(table),
        f"{report['rollouts']} rollouts of {report['prompts']} prompts; effective: {report['effective']:.0f}",
        f"mean weight {weight['value']:.3f} ({weight['low']:.3f} to {weight['high']:.3f}), 1 when all is well",
        *(f"note: {note}" for note in result["notes"]),
        f"{result['checkpoint']} {result['words']}",
    ]
    return "\n".join(lines)


def gateway_words(result: dict[str, Any]) -> str:
    """What came of an agent program's episodes."""
    means = (f"{name} {'not known' if result[name] is None else format(result[name], '.3f')}" for name in
             ("success", "reward"))  # fmt: skip
    lines = [f"{result['episodes']} episodes, {', '.join(means)}, {result['tokens']} sampled tokens"]
    lines += [f"{count} not judged: {why}" for why, count in result["failures"].items()]
    return "\n".join([*lines, f"{result['stored']} rollouts added: {result['folder']}"])


def _success(row: dict[str, Any], passes: str) -> list[str]:
    low, high = row[f"{passes}_interval"]
    return [f"{row[passes]:.3f}", f"{low:.3f} - {high:.3f}"]


def _gains(differences: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """What improved over what, two measures side by side: 80 columns have room for no more."""
    modes = list(dict.fromkeys(mode for passes in differences.values() for mode in passes))
    lines: list[str] = []
    for pair in (modes[i : i + 2] for i in range(0, len(modes), 2)):
        head = ["gain", *(cell for mode in pair for cell in (MODES.get(mode, mode), "95 % interval"))]
        rows = [[name, *(c for mode in pair for c in _gain(gains.get(mode)))] for name, gains in differences.items()]
        lines += aligned([head, *rows])
    return lines


def _gain(found: dict[str, float] | None) -> list[str]:
    return [f"{found['mean']:+.3f}", f"{found['low']:+.3f} to {found['high']:+.3f}"] if found else ["", ""]
