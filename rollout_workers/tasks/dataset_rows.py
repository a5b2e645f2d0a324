"""Rows of one's own as a task: ``jsonl`` and ``parquet`` files, or a Hugging Face ``dataset``, with a prompt in each
row.

Whether a row is held out is decided by a hash of its prompt, so a prompt that occurs twice is never in both splits; or
the held-out rows come from a file or split of their own, and then rows to train on with one of their prompts are left
out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from configs.schema import PathStr, Section
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
from rollout_workers.tasks.row_files import Row, read_dataset, read_file, read_options
from rollout_workers.tasks.scorer_options import NO_ANSWER, Limits, Preference, Python, Verifier
from rollout_workers.tasks.scorers import Scorer, build_scorer
from rollout_workers.tasks.verifiers import answer_problem

OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]


class Judging(Section):
    """Options of every task of rows: how a prompt is asked, and how an answer is judged."""

    template: str = "{prompt}"
    """What the model is given, ``{prompt}`` standing for the row's prompt."""
    verifier: Verifier = "exact"
    """``exact`` (but for blanks and case), ``number`` (the last one), ``contains`` (as whole words), ``regex`` (the
    answer is one), ``math`` (math-verify), ``python`` (a function of your own) or ``preference`` (a reward model)."""
    limits: Limits = Limits()
    python: Python | None = None
    preference: Preference | None = None

    def scorer(self) -> Scorer:
        """What judges; ``ValueError`` for sections that do not fit the verifier."""
        if "{prompt}" not in self.template:
            raise ValueError(
                f"task.options.template is {self.template!r:.80} without {{prompt}}; write it where the prompt goes"
            )
        return build_scorer(self.verifier, self.limits, self.python, self.preference)


class RowsOptions(Judging):
    """``task.options`` of ``jsonl`` and ``parquet``."""

    path: PathStr
    """The file; in a config, relative to it."""
    heldout_path: PathStr | None = None
    """A file with the held-out rows; ``null``: a share of the prompts in ``path``."""
    prompt: str = "prompt"
    """Key of the prompt."""
    answer: str = "answer"
    """Key of the answer, a text or a number; verifiers ``python`` and ``preference`` do without."""
    response: str | None = None
    """Key of the text to train on; ``null``: the answer."""
    heldout_share: OpenShare = 0.2
    """Share of the prompts that is held out."""

    def sources(self) -> tuple[Iterable[tuple[str, Row]], Iterable[tuple[str, Row]] | None]:
        """Rows with their places, and the held-out ones where they are apart."""
        return read_file(Path(self.path)), None if self.heldout_path is None else read_file(Path(self.heldout_path))


class DatasetOptions(RowsOptions):
    """``task.options`` of ``dataset``; ``path`` is a ``save_to_disk`` folder, or whatever ``datasets.load_dataset``
    takes."""

    subset: str | None = None
    """The data set's configuration."""
    split: str = "train"
    heldout_split: str | None = None
    """``null``: a share of the prompts in ``split``."""

    def sources(self) -> tuple[Iterable[tuple[str, Row]], Iterable[tuple[str, Row]] | None]:
        """Rows of the two splits."""
        if self.heldout_path is not None:
            raise ValueError("task.options.heldout_path is for files; of a data set set task.options.heldout_split")
        held = None if self.heldout_split is None else read_dataset(self.path, self.subset, self.heldout_split)
        return read_dataset(self.path, self.subset, self.split), held


class Rows:
    """The task; see the module's docstring."""

    def __init__(self, name: str, train: Sequence[Row], heldout: Sequence[Row], judging: Judging) -> None:
        self.name = name
        self.scorer = judging.scorer()
        self.parts = (*self.scorer.parts, "answered")
        self._template = judging.template
        known = {row["prompt"] for row in heldout}
        self._rows: dict[Split, list[Row]] = {
            "train": [row for row in train if row["prompt"] not in known],
            "heldout": list(heldout),
        }
        for split, rows in self._rows.items():
            if not rows:
                raise ValueError(
                    f"{name}: no row falls to the {split} split; add rows, or change task.options.heldout_share"
                )

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The rows of the split, in their order."""
        require_split(split)
        return LazySequence(len(self._rows[split]), lambda index: self._prompt(split, index))

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """The responses as they stand in the rows, else the answers; ``ValueError`` when indexed where there is
        neither."""
        prompts = self.prompts(split)
        return LazySequence(len(prompts), lambda i: Demonstration(prompt=prompts[i], response=_response(prompts[i])))

    def score(self, prompt: Prompt, text: str) -> Score | Failure:
        """The scorer's verdict; the part ``answered`` is 1 for any text that is not blank."""
        return self.score_batch([prompt], [text])[0]

    def score_batch(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score | Failure]:
        """As ``score``, for many at once."""
        rows = [dict(prompt.metadata) for prompt in prompts]
        verdicts = self.scorer.score(rows, texts)
        return [
            verdict
            if isinstance(verdict, Failure)
            else replace(verdict, parts={**verdict.parts, "answered": float(bool(text.strip()))})
            for verdict, text in zip(verdicts, texts, strict=True)
        ]

    def _prompt(self, split: Split, index: int) -> Prompt:
        row = self._rows[split][index]
        return Prompt(
            id=f"{self.name}/{split}/{index}", text=self._template.replace("{prompt}", str(row["prompt"])), metadata=row
        )


def _response(prompt: Prompt) -> str:
    text = prompt.metadata.get("response", prompt.metadata.get("answer"))
    if text is None:
        raise ValueError(
            f"{prompt.id} has neither answer nor response: set task.options.response, or train on other data"
        )
    return str(text)


def build_rows(name: str, options: Mapping[str, object]) -> Rows:
    """``jsonl``, ``parquet`` or ``dataset``; ``ValueError`` names what is wrong, and where."""
    kind = DatasetOptions if name == "dataset" else RowsOptions
    if "path" not in options:
        raise ValueError(
            f"task.options.path of {name} is missing; e.g. task.options: "
            f"{{path: data.{'jsonl' if name == 'jsonl' else name}}}"
        )
    settings = read_options(kind, options, name)
    every, held = settings.sources()
    train = list(_mapped(every, settings))
    if held is not None:
        return Rows(name, train, list(_mapped(held, settings)), settings)
    falls: dict[Split, list[Row]] = {"train": [], "heldout": []}
    for row in train:
        falls[split_of(str(row["prompt"]), settings.heldout_share)].append(row)
    return Rows(name, falls["train"], falls["heldout"], settings)


def _mapped(rows: Iterable[tuple[str, Row]], options: RowsOptions) -> Iterator[Row]:
    """Rows with the keys ``prompt``, ``answer`` and ``response`` and whatever else they have; ``ValueError`` names
    place, key, remedy."""
    for place, row in rows:
        found: Row = {"prompt": _value(row, options.prompt, place, "prompt")}
        if options.answer in row or options.verifier not in NO_ANSWER:
            answer = found["answer"] = _value(row, options.answer, place, "answer")
            if problem := answer_problem(options.verifier, answer):
                raise ValueError(f"{place}: {options.answer!r} {problem}")
        if options.response is not None:
            found["response"] = _value(row, options.response, place, "response")
        yield {k: v for k, v in row.items() if k not in (options.prompt, options.answer, options.response)} | found


def _value(row: Mapping[str, object], key: str, place: str, option: str) -> str:
    if key not in row:
        near = difflib.get_close_matches(key, list(row), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"{place}: no key {key!r}; {hint}set task.options.{option} to one of "
            f"{', '.join(map(repr, row)) or 'its keys'}"
        )
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"{place}: {key!r} is {value!r:.60}, not a text or number; mend or remove the row")
    return str(value)
