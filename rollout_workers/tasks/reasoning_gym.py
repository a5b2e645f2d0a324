"""Any reasoning-gym generator as a task: ``reasoning_gym/<dataset>``.

Items are made when indexed. Whether a question is held out is decided by a hash of the question itself, so train and
held-out share none; the two splits also draw from different seeds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rollout_workers.tasks.protocol import Demonstration, Failure, LazySequence, Prompt, Score, Split, require_split, split_of
from rollout_workers.tasks.reading import EXTRA, near

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
OWN_OPTIONS = ("seed", "partial", "worked")
# What a verifier can raise on an odd answer. Anything else is a defect and should be seen.
_VERIFIER_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, SyntaxError, RecursionError)
# Some verifiers hand the answer to sympy's parser, which evaluates it: calls, powers and factorials can run for hours.
_EVALUATES = re.compile(r"__|\*\*|\^|[\d)]\s*!|[A-Za-z_]\w*\s*\(|\blambda\b")


def extract_answer(text: str) -> str:
    """The answer in a response: after the last ``Answer:``, if there is one, the first line that is not blank.

    What follows a ``Question:`` the model made up itself is cut off first.
    """
    own = text.split("\nQuestion:")[0]
    for line in own.rsplit("Answer:", 1)[-1].splitlines():
        if line.strip():
            return line.strip()
    return ""


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

    def generator(self, split: Split, round_: int) -> Any:
        from reasoning_gym import create_dataset

        seed = (self.seed * _ROUNDS + round_) * _SEED_STRIDE + (_HELDOUT_OFFSET if split == "heldout" else 0)
        size = LENGTHS[split] + (SHOT_POOL if split == "train" else 0)
        try:
            return create_dataset(self.dataset, seed=seed, size=size, **self.options)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"task.options {dict(self.options)} do not suit reasoning_gym/{self.dataset}: {error}") from error


class ReasoningGym:
    """The task; see the module's docstring."""

    parts = ("success", "mark", "answered")

    def __init__(self, source: _Source, *, shots: int, partial: bool, worked: bool) -> None:
        self.name = f"reasoning_gym/{source.dataset}"
        self._source = source
        self._partial = partial
        self._worked = worked
        self._generators: dict[tuple[str, int], Any] = {}
        self._generator("train", 0)  # says now, not in a worker, that an option is out of range
        chosen = [self._entry("train", LENGTHS["train"] + i) for i in range(shots)]
        self._shots = [(entry["question"].strip(), self._gold(entry)) for entry in chosen]

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Questions of the split, with the same solved train questions before each."""
        require_split(split)
        return LazySequence(LENGTHS[split], lambda index: self._prompt(split, index))

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """The gold answers, or with the option ``worked`` the worked solutions; ``ValueError`` when indexed for a dataset without."""
        require_split(split)
        return LazySequence(LENGTHS[split], lambda index: self._demonstration(self._prompt(split, index)))

    def score(self, prompt: Prompt, text: str) -> Score | Failure:
        """The dataset's own verdict on the answer in ``text``: success is a full mark (1.0).

        The reward is 1 or 0, or the raw mark with the option ``partial``. An answer that the verifier would have to
        evaluate (calls, powers, factorials) although the gold answer has none is wrong, unseen.
        """
        entry: dict[str, Any] = prompt.metadata["entry"]  # type: ignore[assignment]
        answer = extract_answer(text)
        gold = str(entry.get("answer") or "")
        refused = len(answer) > max(_LONGEST_ANSWER, 2 * len(gold)) or bool(_EVALUATES.search(answer) and not _EVALUATES.search(gold))
        if refused or not answer:
            return Score(reward=0.0, success=False, parts={"success": 0.0, "mark": 0.0, "answered": float(bool(answer))})
        try:
            mark = float(self._generator("train", 0).score_answer(answer, entry))
        except _VERIFIER_ERRORS as error:
            return Failure(kind="verifier_error", message=f"{type(error).__name__}: {error} (answer {answer[:80]!r})")
        success = mark >= 1.0
        reward = mark if self._partial else float(success)
        return Score(reward=reward, success=success, parts={"success": float(success), "mark": mark, "answered": 1.0})

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
        raise ValueError(f"{self.name} with these options has too few different questions for a {split} split; widen task.options")

    def _gold(self, entry: Mapping[str, Any]) -> str:
        if entry["answer"] is None:
            raise ValueError(f"{self.name} has no gold answers: set task.shots to 0 and train on other data than the task's demonstrations")
        return str(entry["answer"])

    def _prompt(self, split: Split, index: int) -> Prompt:
        entry = self._entry(split, index)
        return Prompt(id=f"{self.name}/{split}/{index}", text=render(entry["question"], self._shots), metadata={"entry": entry})

    def _demonstration(self, prompt: Prompt) -> Demonstration:
        entry: dict[str, Any] = prompt.metadata["entry"]  # type: ignore[assignment]
        worked = entry.get("metadata", {}).get("answer_cot") if self._worked else None
        if self._worked and not worked:
            raise ValueError(f"{self.name} has no worked solutions: set task.options.worked to false")
        return Demonstration(prompt=prompt, response=str(worked) if worked else self._gold(entry))


def build_reasoning_gym(dataset: str, options: Mapping[str, object], *, shots: int) -> ReasoningGym:
    """The task of a dataset; ``ValueError`` when the package, the dataset or an option is not there."""
    try:
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "reasoning_gym":
            raise
        raise ValueError(f"task.name is 'reasoning_gym/{dataset}', but reasoning-gym is not installed; {EXTRA}") from error
    if dataset not in DATASETS:
        raise ValueError(
            f"task.name is 'reasoning_gym/{dataset}', and reasoning-gym has no such dataset; {near(dataset, sorted(DATASETS))}"
        )
    theirs = [field.name for field in fields(DATASETS[dataset][1]) if field.name not in ("seed", "size")]
    known = sorted([*theirs, *OWN_OPTIONS])
    for key in options:
        if key not in known:
            raise ValueError(f"task.options.{key} is no option of reasoning_gym/{dataset}; {near(key, known)}")
    seed, partial = options.get("seed", 0), options.get("partial", False)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"task.options.seed is {seed!r}; it must be a whole number, at least 0")
    worked = options.get("worked", False)
    if not isinstance(partial, bool) or not isinstance(worked, bool):
        raise ValueError(f"task.options: partial is {partial!r} and worked is {worked!r}; both must be true or false")
    passed = {key: value for key, value in options.items() if key not in OWN_OPTIONS}
    return ReasoningGym(_Source(dataset=dataset, options=passed, seed=seed), shots=shots, partial=partial, worked=worked)
