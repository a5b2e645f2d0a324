"""Any reasoning-gym generator as a task: ``reasoning_gym/<dataset>``.

Items are made when indexed. Whether a question is held out is decided by a hash of the question itself, so train and
held-out share none; the two splits also draw from different seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from configs.schema import Section
from rollout_workers.judging.texts import said
from rollout_workers.tasks.forks import forks
from rollout_workers.tasks.protocol import (
    Demonstration,
    Failure,
    LazySequence,
    Prompt,
    Score,
    Split,
    require_split,
    split_of,
)
from rollout_workers.tasks.row_files import EXTRA, near, read_options
from rollout_workers.tasks.scorer_options import Limits
from rollout_workers.tasks.scorers import confinement

LENGTHS: Mapping[str, int] = {"train": 19_000, "heldout": 1_000}
"""word_ladder refuses more than 20,000 items; a few generators build all theirs when they are made."""
SHOT_POOL = 1_000
"""Train items past the end of the split: few-shot examples come from these."""
HELDOUT_SHARE = 0.2
_ROUNDS = 64
_SEED_STRIDE = 1_000_000  # generators draw item i from seed + i: seeds must lie further apart than items
_HELDOUT_OFFSET = 500_000
_LONGEST_ANSWER = 2_000
INSTRUCTION = "Answer with only the final answer."
OWN_OPTIONS = ("seed", "partial", "worked", "limits")


def extract_answer(text: str, *, lines: bool = False) -> str:
    """The answer in a response: after the last ``Answer:``, if there is one, the first line that is not blank.

    What follows a ``Question:`` the model made up itself is cut off first, and what is thought or stands outside
    ``<answer>``. ``lines``: all lines, for answers such as
    boards.
    """
    own = said(text.split("\nQuestion:")[0]).rsplit("Answer:", 1)[-1].strip()
    return own if lines else own.split("\n")[0].strip()


def render(question: str, shots: Sequence[tuple[str, str]]) -> str:
    """The prompt's text: instruction, solved examples, question."""
    examples = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots)
    return f"{INSTRUCTION}\n\n{examples}Question: {question.strip()}\nAnswer:"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Makes generators of one dataset, one per (split, round)."""

    dataset: str
    options: Mapping[str, object]
    seed: int

    def settings(self, split: Split, round_: int) -> dict[str, Any]:
        """What the generator is made with, here and where answers are judged."""
        seed = (self.seed * _ROUNDS + round_) * _SEED_STRIDE + (_HELDOUT_OFFSET if split == "heldout" else 0)
        size = LENGTHS[split] + (SHOT_POOL if split == "train" else 0)
        return {"dataset": self.dataset, "seed": seed, "size": size, "options": dict(self.options)}

    def generator(self, split: Split, round_: int) -> Any:
        from reasoning_gym import create_dataset

        made = self.settings(split, round_)
        try:
            return create_dataset(made["dataset"], seed=made["seed"], size=made["size"], **made["options"])
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"task.options {dict(self.options)} do not suit reasoning_gym/{self.dataset}: {error}"
            ) from error


def _longest(entry: Mapping[str, Any]) -> int:
    """Characters of an answer that is looked at."""
    return max(_LONGEST_ANSWER, 2 * len(str(entry.get("answer") or "")))


class ReasoningGym:
    """The task; see the module's docstring."""

    parts = ("success", "mark", "answered")

    def __init__(self, source: _Source, *, shots: int, partial: bool, worked: bool, limits: Limits) -> None:
        self.name = f"reasoning_gym/{source.dataset}"
        self._source = source
        self._partial = partial
        self._worked = worked
        self._generators: dict[tuple[str, int], Any] = {}
        self._forks = forks(confinement("rollout_workers.judging.gym", limits))
        self._generator("train", 0)  # says now, not in a worker, that an option is out of range
        chosen = [self._entry("train", LENGTHS["train"] + i) for i in range(shots)]
        self._shots = [(entry["question"].strip(), self._gold(entry)) for entry in chosen]

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Questions of the split, with the same solved train questions before each."""
        require_split(split)
        return LazySequence(LENGTHS[split], lambda index: self._prompt(split, index))

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """The gold answers, or with the option ``worked`` the worked solutions; ``ValueError`` when indexed for a
        dataset without."""
        require_split(split)
        return LazySequence(LENGTHS[split], lambda index: self._demonstration(self._prompt(split, index)))

    def score(self, prompt: Prompt, text: str) -> Score | Failure:
        """The dataset's own verdict on the answer in ``text``: success is a full mark (1.0).

        The reward is 1 or 0, or the raw mark with the option ``partial``. An answer that is far too long is wrong,
        unseen.
        """
        return self.score_batch([prompt], [text])[0]

    def score_batch(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score | Failure]:
        """As ``score``, for many at once: each answer is judged in a process of its own, several at a time."""
        entries: list[Any] = [prompt.metadata["entry"] for prompt in prompts]
        golds = [str(entry["answer"] or "").strip() for entry in entries]
        answers = [extract_answer(text, lines="\n" in gold) for text, gold in zip(texts, golds, strict=True)]
        asked = [place for place, answer in enumerate(answers) if answer and len(answer) <= _longest(entries[place])]
        judge = self._source.settings("train", 0)
        marks = self._forks.call(judge, [entries[i] for i in asked], [answers[i] for i in asked], name=self.name)
        found: dict[int, float | Failure] = dict(zip(asked, marks, strict=True))
        return [self._verdict(found.get(place, 0.0), bool(answer)) for place, answer in enumerate(answers)]

    def _verdict(self, mark: float | Failure, answered: bool) -> Score | Failure:
        if isinstance(mark, Failure):
            return mark
        if not math.isfinite(mark):
            return Failure(kind="reward_not_finite", message=f"the mark is {mark}")
        success = mark >= 1.0
        parts = {"success": float(success), "mark": mark, "answered": float(answered)}
        return Score(reward=mark if self._partial else float(success), success=success, parts=parts)

    def _generator(self, split: Split, round_: int) -> Any:
        key = (split, round_)
        if key not in self._generators:
            self._generators[key] = self._source.generator(split, round_)
        return self._generators[key]

    def _entry(self, split: Split, index: int) -> dict[str, Any]:
        """Item ``index`` of the first seed whose item there has a question that belongs to the split."""
        for round_ in range(_ROUNDS):
            entry: dict[str, Any] = self._generator(split, round_)[index]
            if split_of(entry["question"], HELDOUT_SHARE) == split:
                return entry
        raise ValueError(
            f"{self.name} with these options has too few different questions for a {split} split; widen task.options"
        )

    def _gold(self, entry: Mapping[str, Any]) -> str:
        if entry["answer"] is None:
            raise ValueError(
                f"{self.name} has no gold answers: set task.shots to 0 and train on other data than the "
                "task's demonstrations"
            )
        return str(entry["answer"])

    def _prompt(self, split: Split, index: int) -> Prompt:
        entry = self._entry(split, index)
        return Prompt(
            id=f"{self.name}/{split}/{index}", text=render(entry["question"], self._shots), metadata={"entry": entry}
        )

    def _demonstration(self, prompt: Prompt) -> Demonstration:
        entry: dict[str, Any] = prompt.metadata["entry"]  # type: ignore[assignment]
        worked = entry.get("metadata", {}).get("answer_cot") if self._worked else None
        if self._worked and not worked:
            raise ValueError(f"{self.name} has no worked solutions: set task.options.worked to false")
        return Demonstration(prompt=prompt, response=str(worked) if worked else self._gold(entry))


class _Own(Section):
    """The one option of ours that has options itself."""

    limits: Limits = Limits()


def build_reasoning_gym(dataset: str, options: Mapping[str, object], *, shots: int) -> ReasoningGym:
    """The task of a dataset; ``ValueError`` when the package, the dataset or an option is not there."""
    try:
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "reasoning_gym":
            raise
        raise ValueError(
            f"task.name is 'reasoning_gym/{dataset}', but reasoning-gym is not installed; {EXTRA}"
        ) from error
    if dataset not in DATASETS:
        raise ValueError(
            f"task.name is 'reasoning_gym/{dataset}', and reasoning-gym has no such dataset; "
            f"{near(dataset, sorted(DATASETS))}"
        )
    theirs = [field.name for field in fields(DATASETS[dataset][1]) if field.name not in ("seed", "size")]
    known = sorted([*theirs, *OWN_OPTIONS])
    for key in options:
        if key not in known:
            raise ValueError(f"task.options.{key} is not an option of reasoning_gym/{dataset}; {near(key, known)}")
    seed, partial = options.get("seed", 0), options.get("partial", False)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"task.options.seed is {seed!r}; it must be a whole number, at least 0")
    worked = options.get("worked", False)
    if not isinstance(partial, bool) or not isinstance(worked, bool):
        raise ValueError(f"task.options: partial is {partial!r} and worked is {worked!r}; both must be true or false")
    limits = read_options(
        _Own, {key: options[key] for key in ("limits",) if key in options}, f"reasoning_gym/{dataset}"
    ).limits
    passed = {key: value for key, value in options.items() if key not in OWN_OPTIONS}
    source = _Source(dataset=dataset, options=passed, seed=seed)
    return ReasoningGym(source, shots=shots, partial=partial, worked=worked, limits=limits)
