"""Held-out results of a run's models, with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.gates import final_of
from pipeline.evaluation.modes import MODES, greedy_words
from pipeline.pages.charts.records import Dot, Dots
from pipeline.pages.charts.words import between, number
from pipeline.pages.report.records import ReportSection, Table
from pipeline.pages.report.sources import Sources
from pipeline.runs.stage_table import STAGES, TOKEN_LEVEL, TOKEN_SFT

NAMES = {str(stage.variant): stage.shown for stage in STAGES if stage.shown} | {"offline": "offline RL"}
MEASURES = (
    ("nll", "NLL of demonstrations, nats per token"),
    ("nll_rise", "NLL minus base NLL"),
    ("kl_to_base", "KL to the base LM, nats per token"),
    ("distinct_1", "distinct-1"),
    ("distinct_2", "distinct-2"),
    ("differing_pairs_successful", "differing pairs among solutions"),
    ("semantic_diversity", "semantic diversity"),
    ("greedy_token_cost", "seconds per token by token over by code"),
    ("sampled_failures", "responses that the verifier could not judge"),
)
ALONE = (
    "One run: the intervals are over prompts and say nothing about other seeds (latent-control compare takes several)."
)
UNLIKE = (
    "The token level is no fair comparison here: an earlier version started it from the base LM as finetune changed "
    "it under codes, not from its own SFT. Run the config again."
)


def shown(variant: str) -> str:
    """A model's name as it is read."""
    return NAMES.get(variant, variant)


def result(sources: Sources) -> ReportSection:
    """The table base, cloned, finetuned, improved, token level; paired differences; other measures."""
    rows = sources.variants
    if not rows:
        why = (
            "The run has not been evaluated (yet)."
            if sources.config.evaluation is not None
            else "The config has no evaluation."
        )
        return ReportSection(
            name="result",
            title="Result",
            lines=[f"{why} latent-control evaluate RUN does that for the stages that are done."],
        )
    evaluation = sources.evaluation
    samples = int(evaluation.get("samples_per_prompt", 1))
    times = "once" if samples == 1 else f"{samples} times"
    note = f"{evaluation['prompts']} held-out prompts, each played {times} sampled and once greedy; 95 % intervals: "
    note += "Wilson's" if samples == 1 else "Wilson's (greedy), bootstrap over prompts (sampled)"
    note += ", exact where few prompts differ from the rest"
    tables = [_success(rows, note), *_differences(evaluation), *_measures(rows)]
    return ReportSection(
        name="result",
        title="Result",
        lines=[
            sentence(evaluation, rows),
            ALONE,
            *(f"Greedy: {words}." for words in greedy_words(evaluation)),
            *([UNLIKE] if TOKEN_LEVEL in rows and sources.config.finetune and TOKEN_SFT not in rows else []),
            *evaluation.get("notes", []),
            *sources.summary.get("warnings", []),
        ],
        figures=[dots(rows, note)],
        tables=tables,
    )


def sentence(evaluation: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What the last model achieves, and no more than the paired intervals allow to be said of the difference to the
    others."""
    final = final_of(evaluation)
    row = rows[final]
    by_token = f" ({number(row['greedy_token'])} by token)" if "greedy_token" in row else ""
    text = (
        f"{shown(final).capitalize()} solves {number(row['sampled'])} of the held-out prompts sampled, "
        f"{number(row['greedy'])} greedy{by_token}."
    )
    for name, passes in evaluation.get("differences", {}).items():
        better, _, worse = name.partition(" - ")
        if better == final:
            text += (
                f" Against {shown(worse)}: "
                + ", ".join(_said(mode, passes[mode]) for mode in MODES if mode in passes)
                + "."
            )
    return text


def _said(mode: str, found: Mapping[str, float]) -> str:
    seen = "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "no difference can be seen"
    return f"{MODES[mode]} {found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}), {seen}"


def dots(rows: Mapping[str, Mapping[str, Any]], note: str) -> Dots:
    """Success of every model, sampled and greedy."""
    made = [
        (
            shown(name),
            [
                Dot(kind=MODES[m], value=row[m], low=row[f"{m}_interval"][0], high=row[f"{m}_interval"][1])
                for m in MODES
                if m in row
            ],
        )
        for name, row in rows.items()
    ]
    return Dots(name="success-rates", title="Success on held-out prompts", rows=made, note=note)


def _success(rows: Mapping[str, Mapping[str, Any]], note: str) -> Table:
    passes = sorted(
        {k for row in rows.values() for k in row if k.startswith("pass_at_") and not k.endswith("_interval")},
        key=lambda k: int(k[8:]),
    )
    modes = [mode for mode in MODES if any(mode in row for row in rows.values())]
    head = ["model", *(cell for mode in modes for cell in (MODES[mode], "95 % interval")), "tokens"]
    head += [cell for name in passes for cell in (name.replace("pass_at_", "pass@"), "95 % interval")]
    body = []
    for name, row in rows.items():
        cells = [shown(name)]
        for measure in modes:
            cells += [number(row[measure]), between(*row[f"{measure}_interval"])] if measure in row else ["–", "–"]
        cells.append(f"{row['sampled_tokens']:.1f}")
        for measure in passes:
            cells += [number(row[measure]), between(*row[f"{measure}_interval"])] if measure in row else ["–", "–"]
        body.append(cells)
    return Table(
        title="Success of each model", head=head, rows=body, note=note + "; tokens: mean length of a sampled response"
    )


def _differences(evaluation: Mapping[str, Any]) -> list[Table]:
    found = evaluation.get("differences", {})
    if not found:
        return []
    measures = list(dict.fromkeys(measure for passes in found.values() for measure in passes))
    rows = []
    for name, passes in found.items():
        better, _, worse = name.partition(" - ")
        cells = [f"{shown(better)} − {shown(worse)}"]
        for measure in measures:
            d = passes.get(measure)
            cells += ["–", "–"] if d is None else [f"{d['mean']:+.3f}", f"{d['low']:+.3f} to {d['high']:+.3f}"]
        rows.append(cells)
    names = [MODES.get(measure, measure.replace("_", " ")) for measure in measures]
    head = ["difference", *(cell for name in names for cell in (name, "95 % interval"))]
    return [
        Table(
            title="Paired differences",
            head=head,
            rows=rows,
            note="On the same prompts; 95 % intervals over prompts: bootstrap, exact sign test where few differ.",
        )
    ]


def _measures(rows: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    body = []
    for key, label in MEASURES:
        values = [row.get(key) for row in rows.values()]
        if any(value is not None for value in values):
            body.append([label, *("–" if value is None else number(float(value)) for value in values)])
    head = ["measure", *map(shown, rows)]
    return (
        [Table(title="Other measures", head=head, rows=body, note="docs/evaluation.md says what each is.")]
        if body
        else []
    )


def gates(sources: Sources) -> ReportSection:
    """The config's gates with their verdicts."""
    judged = sources.summary.get("gates")
    if not sources.config.gates:
        return ReportSection(name="gates", title="Gates", lines=["The config has no gates (docs/evaluation.md)."])
    if judged is None:
        rows = [[gate, "not judged yet", "–", "–"] for gate in sources.config.gates]
    else:
        rows = [
            [v["gate"], "passed" if v["passed"] else "FAILED", shown(v["variant"]), _measured(v["value"])]
            for v in judged["verdicts"]
        ]
    line = (
        "Not judged yet."
        if judged is None
        else "All gates passed."
        if judged["passed"]
        else "A gate failed: the run ended with exit code 3."
    )
    return ReportSection(
        name="gates",
        title="Gates",
        lines=[line],
        tables=[Table(title="Verdicts", head=("gate", "verdict", "of", "value"), rows=rows)],
    )


def _measured(value: float | None) -> str:
    return "not measured" if value is None else number(value)
