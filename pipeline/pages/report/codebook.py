"""Health of the codebook: which codes are alive, how evenly they are used, what they reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_control.analysis.measures import ALIVE_SHARE
from latent_control.decoding.rescoring import choices
from latent_control.pretrained import CONFIG, read_config
from pipeline.pages.explorer.counts import entropy
from pipeline.pages.records import Curve, Figure, ReportSection, Table, number
from pipeline.pages.report.curves import plain
from pipeline.pages.report.results import shown
from pipeline.pages.report.sources import Sources
from pipeline.replay.reader import ReplayReader
from pipeline.runs.layout import REPLAY
from pipeline.runs.metrics_log import with_whose
from pipeline.runs.stage_table import ACTIONS, EVALUATE, LATENT_STAGES
from pipeline.runs.summary import collapse_words

MOST_ROLLOUTS, BARS = 20_000, 256
LAST = 0.1
"""Usage is that of this last share of the updates."""
USAGE = (("alive_codes", "active codes"), ("alive_share", "share of active codes"), ("code_perplexity", "perplexity"))
HEALTH = (
    *((f"policy_{key}", f"{label} of the policy on held-out prompts") for key, label in USAGE),
    *((f"rollouts_{key}", f"{label} of the last update's training rollouts") for key, label in USAGE),
    *((f"inverse_dynamics_{key}", f"{label} of the inverse dynamics model's labels") for key, label in USAGE),
    ("coverage", "coverage: share of gold tokens that are some code's argmax"),
    ("distinct_tokens", "distinct argmax tokens of all codes per state"),
    ("nll_codes", "NLL of the next token given the codes, nats"),
    ("nll_base", "NLL of the base LM, nats"),
)


def usage_of(rows: Sequence[Mapping[str, Any]], num_actions: int, span: int) -> np.ndarray:
    """[N], how often rollouts (``actions``, ``generated``, ``policy_version``) of the last updates chose each code; a
    code of a span counts once, observed tokens not at all."""
    versions = np.unique([row["policy_version"] for row in rows])
    late = versions[-max(1, round(LAST * len(versions)))]
    counts = np.zeros(num_actions, np.int64)
    for row in (row for row in rows if row["policy_version"] >= late):
        codes = np.asarray(row["actions"], np.int64)
        np.add.at(counts, codes[choices(row.get("generated", ()), len(codes), span)], 1)
    return counts


def read_usage(run_dir: Path, num_actions: int, span: int) -> np.ndarray | None:
    """[N], shares of the codes in the rollouts of the last updates, as far as the replay buffer has them; ``None`` when
    there are none of latent actions."""
    if not (run_dir / REPLAY).is_dir():
        return None
    stored = ReplayReader(run_dir, shuffle=False, columns=("level",), move_damaged=False).rows_stored
    every = max(1, -(-stored // MOST_ROLLOUTS))
    columns = ("level", "actions", "generated", "policy_version")
    reader = ReplayReader(run_dir, shuffle=False, columns=columns, world=every, move_damaged=False)
    rows = [row for row in reader.rows() if row["level"] == "latent" and len(row["actions"])]
    if not rows:
        return None
    counts = usage_of(rows, num_actions, span)
    return np.asarray(counts / max(1, counts.sum()))


def codebook(sources: Sources) -> ReportSection:
    """Health by stage and by model, usage at the end of reinforcement learning, and how it got there."""
    title, actions = "Codebook", sources.config.actions
    shape = _shape(sources)
    if shape is None and actions is None:
        return ReportSection(name="codebook", title=title, lines=["The run has no codes."])
    num_actions, span = shape or (actions.num_actions, actions.span)  # type: ignore[union-attr]
    lines = [f"{num_actions} codes" + (f", each for {span} tokens." if span > 1 else ", one for each token.")]
    figures: list[Figure] = []
    lines += collapse_words(sources.summary)
    usage = read_usage(sources.run_dir, num_actions, span)
    if usage is not None:
        alive = int((usage > ALIVE_SHARE / num_actions).sum())
        lines.append(
            f"Among the training rollouts of the last {LAST:.0%} of the updates {alive} codes are active (used more "
            f"than {ALIVE_SHARE:g} / {num_actions} of the time), and their code perplexity is "
            f"{np.exp(entropy(usage)):.1f}."
        )
        figures.append(_usage_bars(usage))
    else:
        lines.append(
            "Usage in reinforcement learning is not known: there are no rollouts of latent actions in a replay buffer."
        )
    for metric, name in (
        ("inverse_dynamics_alive_share", "Active codes while the codebook is learned"),
        ("nll_codes", "Held-out NLL given the codes"),
    ):
        x, y = sources.series(ACTIONS, metric)
        if len(x) > 1:
            curve, short = plain(metric.replace("_", " "), x, y), f"actions-{metric.replace('_', '-')}"
            figures.append(Figure(name=short, title=name, across="update", curves=[curve], note="On held-out texts"))
    return ReportSection(name="codebook", title=title, lines=lines, figures=figures, tables=_tables(sources))


def _shape(sources: Sources) -> tuple[int, int] | None:
    """Codes and span of the newest latent checkpoint; the config's actions section may be null, then they come from
    elsewhere."""
    for stage in LATENT_STAGES:
        record = sources.stages.get(stage)
        folder = sources.run_dir / str(record["checkpoint"]) if record else None
        if folder is not None and (folder / CONFIG).is_file():
            found = read_config(folder)["latent_actions"]
            return int(found["num_actions"]), int(found.get("span", 1))
    return None


def _usage_bars(usage: np.ndarray) -> Figure:
    order = np.argsort(-usage, kind="stable")[:BARS].tolist()
    title = "Usage of each code at the end" + (f" (the {BARS} most used)" if len(usage) > BARS else "")
    levels = (("uniform (1/N)", 1 / len(usage)), ("active threshold", ALIVE_SHARE / len(usage)))
    note = f"Share of the choices in the last {LAST:.0%} of the updates, the most used code first"
    places = list(range(len(order)))
    curves = [Curve(name="usage", x=places, y=usage[order].tolist(), kind="bars")]
    curves += [Curve(name=name, x=(0, places[-1]), y=(level, level)) for name, level in levels]
    labels = [str(code) for code in order]
    return Figure(name="code-usage", title=title, across="code", curves=curves, note=note, labels=labels)


def _tables(sources: Sources) -> list[Table]:
    columns: dict[str, Mapping[str, Any]] = {
        f"after {n}": with_whose(n, s["metrics"]) for n, s in sources.stages.items() if n in LATENT_STAGES
    }
    columns |= {shown(name): with_whose(EVALUATE, row) for name, row in sources.variants.items()}
    columns = {name: found for name, found in columns.items() if any(found.get(key) is not None for key, _ in HEALTH)}
    rows = [
        [label, *("–" if found.get(key) is None else number(float(found[key])) for found in columns.values())]
        for key, label in HEALTH
        if any(found.get(key) is not None for found in columns.values())
    ]
    note = (
        "Columns “after”: the stage's own last measurement; the others: the evaluation, the policy's codes in its "
        "sampled responses to held-out prompts, all else on held-out demonstrations. Reinforcement learning changes "
        "nothing of the inverse dynamics model."
    )
    return [Table(title="Health", head=("measure", *columns), rows=rows, note=note)] if rows else []
