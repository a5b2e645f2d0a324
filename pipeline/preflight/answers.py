"""Plays rows' own answers through their verifier: one that is not right by its own verifier is found before a run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from rollout_workers.tasks import Failure, Task
from rollout_workers.tasks.dataset_rows import Rows
from rollout_workers.tasks.mixture import Mixture
from rollout_workers.tasks.row_files import Row
from rollout_workers.tasks.row_values import Item
from rollout_workers.tasks.scorer_options import Verifier

MOST: Mapping[Verifier, int] = {"exact": 50_000, "contains": 50_000, "number": 50_000, "math": 256, "python": 8}
"""Answers that are played, a seeded sample where there are more. ``regex`` answers are compiled when rows are read, and
a reward model has none."""
NAMED = 3


def check_answers(task: Task) -> tuple[list[str], list[str]]:
    """Errors and warnings: each row whose own answer its verifier cannot judge or finds wrong; how many were left out.

    A reward function may find an answer wrong (it may ask for more than the answer), but not fail on it.

    Raises:
        ValueError: the verifier cannot be loaded, or its walls do not stand.
    """
    errors: list[str] = []
    warnings: list[str] = []
    for member in task.tasks if isinstance(task, Mixture) else (task,):
        if isinstance(member, Rows) and (numbers := member.unnamed_classes()):
            warnings.append(
                f"task: {', '.join(map(repr, numbers))} of {member.name} are numbers of classes that have names; to "
                "ask for the names, set task.options.class_names: true"
            )
        if isinstance(member, Rows) and member.verifier in MOST:
            _play(member, MOST[member.verifier], errors, warnings)
    return errors, warnings


def _play(task: Rows, most: int, errors: list[str], warnings: list[str]) -> None:
    every = list(_answered(task))
    played = [every[i] for i in sorted(random.Random(0).sample(range(len(every)), min(most, len(every))))]
    if len(played) < len(every):
        warnings.append(
            f"task: {most} of {len(every)} answers of {task.name} were judged by their verifier {task.verifier} (a "
            f"seeded sample); {len(every) - most} were left out"
        )
    own = task.verifier == "python"
    rows: list[Row] = [item.row if own else {"prompt": item.prompt, "answer": answer} for item, answer in played]
    verdicts = task.scorer.score(rows, [answer for _, answer in played])
    remedy = "mend the function" if own else "mend or remove the row, or set task.options.verifier: exact"
    found = []
    for (item, answer), verdict in zip(played, verdicts, strict=True):
        where = f"task: {item.place}: the answer {answer[:60]!r}"
        if isinstance(verdict, Failure):
            found.append(f"{where} cannot be judged by the verifier {task.verifier}: {verdict.message}; {remedy}")
        elif not (verdict.success or own):
            found.append(f"{where} is wrong by its own verifier, {task.verifier}; {remedy}")
    errors += found[:NAMED]
    if len(found) > NAMED:
        errors.append(f"task: {len(found) - NAMED} more of {len(played)} answers of {task.name} are so")


def _answered(task: Rows) -> Iterator[tuple[Item, str]]:
    """(row, answer); of equal answers the first, but for a reward function, which sees the row."""
    seen: set[str] = set()
    for item in task.items():
        for answer in item.answers or ("",) * (task.verifier == "python"):
            if answer not in seen:
                yield item, answer
            if task.verifier != "python":
                seen.add(answer)
