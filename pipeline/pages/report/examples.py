"""Held-out prompts that the last model solves and its forerunners do not, and the reverse, out of the stored
outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.evaluation.gates import final_of
from pipeline.evaluation.modes import MODES
from pipeline.evaluation.outcomes import Outcome
from pipeline.pages.records import Example, Gallery, ReportSection, Table
from pipeline.pages.report.results import shown
from pipeline.pages.report.sources import Sources
from pipeline.runs.layout import OUTCOMES

REFERENCES = ("base", "cloned")
Key = tuple[str, str]
"""Id and text of a prompt: with other task options the same id is another problem."""
Answers = Mapping[str, Mapping[Key, Outcome]]
"""Variant -> prompt -> its first outcome in one mode."""


def answers_of(outcomes: Sequence[Outcome], mode: str) -> Answers:
    """The first response of each variant to each prompt."""
    found: dict[str, dict[Key, Outcome]] = {}
    for one in outcomes:
        if one.mode == mode and one.sample == 0:
            found.setdefault(one.variant, {})[one.prompt_id, one.prompt] = one
    return found


def change(before: Mapping[Key, Outcome], after: Mapping[Key, Outcome]) -> list[int]:
    """How many of the prompts that both answered are gained, lost, solved by both and by neither."""
    pairs = Counter((before[key].success, after[key].success) for key in before.keys() & after.keys())
    return [pairs[kind] for kind in ((False, True), (True, False), (True, True), (False, False))]


def gained_and_lost(answers: Answers, references: Sequence[str], final: str) -> tuple[list[Key], list[Key]]:
    """Prompts that no reference solves and ``final`` does; and prompts that every reference solves and ``final`` does
    not."""
    common = set.intersection(*(set(answers[name]) for name in (*references, final)))
    gained = [k for k in common if answers[final][k].success and not any(answers[r][k].success for r in references)]
    lost = [k for k in common if not answers[final][k].success and all(answers[r][k].success for r in references)]
    return sorted(gained, key=_order), sorted(lost, key=_order)


def _order(key: Key) -> tuple[int, str, str]:
    """Ids end in a number: 2 before 10."""
    tail = key[0].rsplit("/", 1)[-1]
    return int(tail) if tail.isdecimal() else 0, *key


def examples(sources: Sources) -> ReportSection:
    """Counts in each mode, and examples of greedy responses: in them no luck of sampling plays a part."""
    title = "Gained and lost"
    variants = {o.variant for o in sources.outcomes}
    if not variants:
        none = f"There are no stored outcomes ({OUTCOMES}): the run has not been evaluated (yet)."
        return ReportSection(name="examples", title=title, lines=[none])
    final = final_of(sources.evaluation) if sources.variants else "improved"
    references = [name for name in REFERENCES if name in variants and name != final]
    if final not in variants or not references:
        return ReportSection(name="examples", title=title, lines=["There is one model only: nothing to compare."])
    others = [n for n in (*references, "finetuned", "offline", "token_level") if n in variants and n != final]
    rows = []
    for mode in ("greedy", "greedy_token", "sampled"):
        answers = answers_of(sources.outcomes, mode)
        for name in (name for name in dict.fromkeys(others) if {name, final} <= answers.keys()):
            counted = change(answers[name], answers[final])
            rows.append([f"{shown(name)} → {shown(final)}, {MODES[mode]}", *map(str, counted)])
    note = "Prompts by who solves them; sampled: the first sample, so that a part of what is gained and lost is luck."
    head = ("models", "gained", "lost", "both solve", "neither")
    counts = Table(title="Prompts gained and lost", head=head, rows=rows, note=note)
    answers = answers_of(sources.outcomes, "greedy")
    gained, lost = gained_and_lost(answers, references, final)
    names = " and ".join(map(shown, references))
    most, one = sources.config.report.examples, "s" * (len(references) == 1)
    galleries = [
        _gallery(title, keys, answers, (*references, final), most)
        for title, keys in (
            (f"Gained: {names} fail{one}, {shown(final)} solves it", gained),
            (f"Lost: {names} solve{one} it, {shown(final)} fails", lost),
        )
    ]
    line = f"Greedy responses: {len(gained)} prompts gained, {len(lost)} lost against {names} together."
    return ReportSection(name="examples", title=title, lines=[line], tables=[counts], galleries=galleries)


def _gallery(title: str, keys: Sequence[Key], answers: Answers, names: Sequence[str], most: int) -> Gallery:
    chosen = [keys[round(i * (len(keys) - 1) / max(1, most - 1))] for i in range(most)] if len(keys) > most else keys

    def example(key: Key) -> Example:
        given = [(shown(n), answers[n][key].response, answers[n][key].success) for n in names]
        return Example(prompt_id=key[0], prompt=key[1], answers=given)

    return Gallery(title=title, total=len(keys), examples=list(map(example, chosen)))
