"""Held-out results of a run's models, with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.gates import final_of
from pipeline.evaluation.modes import MODES, greedy_words, rollout_words
from pipeline.pages.records import Curve, Figure, ReportSection, Table, between, number
from pipeline.pages.report.sources import Sources, variants_of
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
    ("greedy_token_cost", "seconds per token, by token as a multiple of by code"),
    ("sampled_failures", "responses that the verifier could not judge"),
)
ALONE = (
    "One run: the intervals are over prompts and say nothing about other seeds (latent-control compare takes several)."
)
UNLIKE = (
    "The token level is not a fair comparison here: an earlier version started it from the base LM as finetune changed "
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
        why += " latent-control evaluate RUN does that for the stages that are done."
        return ReportSection(name="result", title="Result", lines=[why])
    evaluation = sources.evaluation
    samples = int(evaluation.get("samples_per_prompt", 1))
    note = f"{rollout_words(evaluation)}; 95 % intervals: "
    note += "Wilson's" if samples == 1 else "Wilson's (greedy), bootstrap over prompts (sampled)"
    note += ", exact where few prompts differ from the rest"
    tables = [_success(rows, note), *_differences(evaluation), *_measures(rows)]
    lines = [sentence(evaluation), ALONE, *(f"Greedy: {words}." for words in greedy_words(evaluation))]
    lines += [UNLIKE] if TOKEN_LEVEL in rows and sources.config.finetune and TOKEN_SFT not in rows else []
    lines += [*evaluation.get("notes", []), *sources.summary.get("warnings", [])]
    return ReportSection(name="result", title="Result", lines=lines, figures=[rates(rows, note)], tables=tables)


def sentence(evaluation: Mapping[str, Any]) -> str:
    """What the last model achieves, and no more than the paired intervals allow to be said of the difference to the
    others."""
    final, (said,) = final_of(evaluation), achieved(evaluation)
    text = f"{said[0].upper()}{said[1:]}."
    for name, passes in evaluation.get("differences", {}).items():
        better, _, worse = name.partition(" - ")
        if better == final:
            said = ", ".join(_said(mode, passes[mode]) for mode in MODES if mode in passes)
            text += f" Against {shown(worse)}: {said}."
    return text


def achieved(evaluation: Mapping[str, Any]) -> list[str]:
    """Of the last model: ``improved solves 0.615 of the held-out prompts sampled, 0.689 greedy (0.678 by token)``."""
    if not (rows := variants_of(evaluation)):
        return []
    row = rows[final := final_of(evaluation)]
    by_token = f" ({number(row['greedy_token'])} by token)" if "greedy_token" in row else ""
    sampled, greedy = number(row["sampled"]), number(row["greedy"])
    return [f"{shown(final)} solves {sampled} of the held-out prompts sampled, {greedy} greedy{by_token}"]


def _said(mode: str, found: Mapping[str, float]) -> str:
    seen = "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "no significant difference"
    return f"{MODES[mode]} {found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}), {seen}"


def rates(rows: Mapping[str, Mapping[str, Any]], note: str) -> Figure:
    """Success of every model, each mode beside the others."""
    modes = _modes(rows)
    curves = []
    for number_of, mode in enumerate(modes):
        there = [(place, row) for place, row in enumerate(rows.values()) if mode in row]
        aside = 0.12 * (number_of - (len(modes) - 1) / 2)
        low, high = ([row[f"{mode}_interval"][end] for _, row in there] for end in (0, 1))
        x, y = [place + aside for place, _ in there], [row[mode] for _, row in there]
        curves.append(Curve(name=MODES[mode], x=x, y=y, low=low, high=high, kind="marks"))
    labels, title = [shown(name) for name in rows], "Success on held-out prompts"
    return Figure(name="success-rates", title=title, across="", curves=curves, note=note, labels=labels)


def _modes(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [mode for mode in MODES if any(mode in row for row in rows.values())]


def _success(rows: Mapping[str, Mapping[str, Any]], note: str) -> Table:
    passes = sorted(
        {k for row in rows.values() for k in row if k.startswith("pass_at_") and not k.endswith("_interval")},
        key=lambda k: int(k[8:]),
    )
    names = {mode: MODES[mode] for mode in _modes(rows)} | {name: name.replace("pass_at_", "pass@") for name in passes}
    head = ["model", *(cell for name in names.values() for cell in (name, "95 % interval")), "tokens"]
    body = []
    for name, row in rows.items():
        cells = [shown(name)]
        for measure in names:
            cells += [number(row[measure]), between(*row[f"{measure}_interval"])] if measure in row else ["–", "–"]
        body.append([*cells, f"{row['sampled_tokens']:.1f}"])
    note += "; tokens: mean length of a sampled response"
    return Table(title="Success of each model", head=head, rows=body, note=note)


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
    note = "On the same prompts; 95 % intervals over prompts: bootstrap, exact sign test where few differ."
    return [Table(title="Paired differences", head=head, rows=rows, note=note)]


def _measures(rows: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    body = []
    for key, label in MEASURES:
        values = [row.get(key) for row in rows.values()]
        if any(value is not None for value in values):
            body.append([label, *("–" if value is None else number(float(value)) for value in values)])
    head, note = ["measure", *map(shown, rows)], "docs/evaluation.md says what each is."
    return [Table(title="Other measures", head=head, rows=body, note=note)] if body else []


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
    said = {None: "Not judged yet.", True: "All gates passed.", False: "A gate failed: the run ended with exit code 3."}
    table = Table(title="Verdicts", head=("gate", "verdict", "of", "value"), rows=rows)
    return ReportSection(name="gates", title="Gates", lines=[said[judged and judged["passed"]]], tables=[table])


def _measured(value: float | None) -> str:
    return "not measured" if value is None else number(value)
