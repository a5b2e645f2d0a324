"""``task check``: scores gold, foreign, scrambled and odd answers with a task, twice, and reports its problems."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from configs.schema import RunConfig, TaskConfig
from pipeline.preflight.answers import check_answers
from pipeline.preflight.check import check_task
from pipeline.preflight.data_sources import Builder
from rollout_workers.tasks import Failure, Prompt, Score, Split, Task, build_task, score_all

SPLITS: tuple[Split, ...] = ("train", "heldout")
ODD = (
    "",
    " \n\t ",
    "0",
    "-1e400",
    "nan",
    "\\boxed{",
    "((((((((",
    "٢٥ ²⁵ \u2028 \0",
    "no idea " * 500,
    "9" * 5000,
    '{"reward": 1}',
    "a" * 64,
)
"""Odd answers that a language model in training may generate."""
SEEN = 512
"""Prompts of each split that are compared."""
TOLERANCE = 1e-3
"""Between two scores of the same answer: a reward model's batches are padded differently."""
HEAD = ("answers", "number", "reward min", "mean", "max", "success", "failed", "ms each", "slowest")


def check(config: TaskConfig, run: RunConfig | None = None, *, count: int, seed: int) -> dict[str, Any]:
    """Report on a task from ``count`` held-out prompts; ``errors`` are what ``config check`` says of it (of ``run``,
    whose task it is, or of its rows alone), ``problems`` are faults, ``warnings`` deserve attention.

    Raises:
        ValueError: the task cannot be built.
    """
    started = time.perf_counter()
    build = Builder()
    task = build(config)
    seconds = time.perf_counter() - started
    twin = build_task(config)
    problems: list[str] = []
    errors: list[str] = []
    warnings: list[str] = []
    if run is None:
        errors, warnings = check_answers(task)
    else:
        check_task(run, build, errors, warnings)
    splits = {split: _split(task, twin, split, problems) for split in SPLITS}
    shared = set(splits["train"].pop("texts")) & set(splits["heldout"].pop("texts"))
    if shared:
        problems.append(f"{len(shared)} prompts are in both splits, e.g. {min(shared)[:60]!r}")
    heldout = task.prompts("heldout")
    prompts = [heldout[i] for i in range(min(count, len(heldout)))]
    rows = [
        _played(task, kind, asked, answers, problems, warnings)
        for kind, (asked, answers) in _answers(task, prompts, random.Random(seed), warnings).items()
        if asked
    ]
    warnings += _compared(rows)
    scorer = getattr(task, "scorer", None)
    printed = getattr(getattr(scorer, "isolation", None), "printed", "")
    if printed:
        warnings.append(f"the reward function prints, which is not shown: {printed[:80]!r}")
    parts = list(task.parts)
    return {"task": task.name, "parts": parts, "build_seconds": seconds, "splits": splits, "rows": rows} | {
        "errors": errors,
        "problems": problems,
        "warnings": warnings,
    }


def _split(task: Task, twin: Task, split: Split, problems: list[str]) -> dict[str, Any]:
    """Size and speed of a split; a second task from the same config must have the same prompts."""
    prompts, again = task.prompts(split), twin.prompts(split)
    seen = min(SEEN, len(prompts))
    started = time.perf_counter()
    mine = [prompts[i] for i in range(seen)]
    each = (time.perf_counter() - started) / max(1, seen)
    if not seen:
        problems.append(f"the {split} split has no prompts")
    different = [p.id for i, p in enumerate(mine) if again[i].text != p.text]
    if different:
        problems.append(
            f"not deterministic: made again, {len(different)} of {seen} {split} prompts differ, e.g. {different[0]}"
        )
    texts = [prompt.text for prompt in mine]
    return {
        "prompts": len(prompts),
        "different": len(set(texts)),
        "compared": seen,
        "ms_per_prompt": 1000 * each,
        "texts": texts,
    }


def _answers(
    task: Task, prompts: Sequence[Prompt], rng: random.Random, warnings: list[str]
) -> dict[str, tuple[list[Prompt], list[str]]]:
    """Prompts and answers by kind: their own gold answers, other prompts' answers, scrambled words, and odd texts."""
    demonstrations = task.demonstrations("heldout")
    try:
        gold = [demonstrations[i].response for i in range(len(prompts))]
    except ValueError as error:
        warnings.append(f"no gold answers to score: {error}")
        gold = []
    words = " ".join(gold or [prompt.text for prompt in prompts]).split() or ["?"]
    scrambled = [" ".join(rng.choices(words, k=rng.randint(1, 20))) for _ in prompts]
    foreign = [(prompts[i], gold[i - 1]) for i in range(len(gold)) if gold[i - 1] != gold[i]]
    return {
        "gold": (list(prompts[: len(gold)]), gold),
        "of others": ([prompt for prompt, _ in foreign], [answer for _, answer in foreign]),
        "scrambled": (list(prompts), scrambled),
        "odd": ([prompts[i % len(prompts)] for i in range(len(ODD))] if prompts else [], list(ODD)),
    }


def _played(
    task: Task, kind: str, prompts: Sequence[Prompt], answers: Sequence[str], problems: list[str], warnings: list[str]
) -> dict[str, Any]:
    """Scores of the answers, together (timed) and then one by one (the slowest; they must be the same)."""
    score_all(task, prompts[:1], answers[:1])  # starts forks and actors
    started = time.perf_counter()
    together = score_all(task, prompts, answers)
    seconds = time.perf_counter() - started
    slowest, changed = 0.0, []
    for prompt, answer, verdict in zip(prompts, answers, together, strict=True):
        started = time.perf_counter()
        alone = task.score(prompt, answer)
        slowest = max(slowest, time.perf_counter() - started)
        if not _same(verdict, alone):
            changed.append(f"{answer[:40]!r}: {_said(verdict)}, then {_said(alone)}")
    if changed:
        problems.append(
            f"not deterministic: {len(changed)} of {len(answers)} {kind} answers were scored differently twice, e.g. "
            f"{changed[0]}"
        )
    scores = [verdict for verdict in together if isinstance(verdict, Score)]
    failures = [verdict for verdict in together if isinstance(verdict, Failure)]
    if failures:
        share = (
            f"{len(failures)} of {len(answers)} {kind} answers could not be judged, e.g. {failures[0].kind}: "
            f"{failures[0].message}"
        )
        (problems if kind == "gold" else warnings).append(share)
    wrong = next((set(score.parts) ^ set(task.parts) for score in scores if set(score.parts) != set(task.parts)), None)
    if wrong:
        problems.append(f"parts of a score and of the task differ by {', '.join(sorted(wrong))}")
    rewards = [score.reward for score in scores]
    return {
        "answers": kind,
        "number": len(answers),
        "reward": {"min": min(rewards), "mean": mean(rewards), "max": max(rewards)} if rewards else None,
        "success": mean(score.success for score in scores) if scores else None,
        "failures": dict(Counter(failure.kind for failure in failures)),
        "ms_each": 1000 * seconds / len(answers),
        "ms_slowest": 1000 * slowest,
    }


def _same(one: Score | Failure, two: Score | Failure) -> bool:
    if isinstance(one, Failure) or isinstance(two, Failure):
        return isinstance(one, Failure) and isinstance(two, Failure) and one.kind == two.kind
    return abs(one.reward - two.reward) <= TOLERANCE * max(1.0, abs(one.reward)) and (
        one.success == two.success or abs(one.reward - two.reward) > 0
    )


def _said(verdict: Score | Failure) -> str:
    return verdict.kind if isinstance(verdict, Failure) else f"{verdict.reward:g}"


def _compared(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings about the reward as a training signal."""
    found = {row["answers"]: row for row in rows if row["reward"] is not None}
    gold, others = found.get("gold"), [row for name, row in found.items() if name != "gold"]
    lines = []
    if gold is not None and gold["success"] < 1:
        lines.append(
            f"gold answers succeed in {gold['success']:.0%} only: is the verifier too strict, or are they no solutions?"
        )
    lines += [f"{row['success']:.0%} of the {row['answers']} answers succeed" for row in others if row["success"] > 0.5]
    if gold is not None and others and all(row["reward"]["mean"] >= gold["reward"]["mean"] for row in others):
        lines.append("gold answers earn no more than the others: the reward carries no training signal")
    return lines


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """The rows as texts, for ``HEAD``."""
    lines = []
    for row in result["rows"]:
        reward = [f"{row['reward'][key]:.3f}" for key in ("min", "mean", "max")] if row["reward"] else ["", "", ""]
        success = "" if row["success"] is None else f"{row['success']:.2f}"
        failed = ", ".join(f"{kind} {number}" for kind, number in row["failures"].items()) or "0"
        lines.append(
            [
                row["answers"],
                str(row["number"]),
                *reward,
                success,
                failed,
                f"{row['ms_each']:.2f}",
                f"{row['ms_slowest']:.1f} ms",
            ]
        )
    return lines
