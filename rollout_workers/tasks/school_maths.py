"""``gsm8k`` and ``math500``: readers of a local copy, in the form in which they are published or in that of the Hugging
Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from configs.schema import PathStr
from rollout_workers.judging.numerals import last_number
from rollout_workers.judging.texts import last_box
from rollout_workers.tasks.dataset_rows import Judging, OpenShare, Rows, split_items
from rollout_workers.tasks.row_files import Row, read_file, read_options, require_shards, split_files, suffix
from rollout_workers.tasks.row_values import Item
from rollout_workers.tasks.scorer_options import Verifier

_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's notes for a calculator: ``48/2 = <<48/2=24>>24``."""
SUBJECTS = frozenset(
    [
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    ]
)
"""Folders of MATH, each with its own files."""


class Gsm8kOptions(Judging):
    """``task.options`` of ``gsm8k``."""

    path: PathStr
    """A folder with GSM8K's files train and test (.jsonl or .parquet)."""
    verifier: Verifier = "number"
    worked: bool = True
    """Demonstrations are the worked solutions, ending in ``#### 42``; else the bare answers."""


class Math500Options(Judging):
    """``task.options`` of ``math500``."""

    path: PathStr
    """The file, or a folder with it; its problems are held out."""
    train: PathStr | None = None
    """File or folder of problems to train on, with ``problem`` and ``solution``, e.g. MATH's; those of MATH-500 are
    left out."""
    heldout_share: OpenShare | None = None
    """Instead of ``train``: hold out this share of MATH-500 and train on the rest. Then results are not MATH-500's."""
    template: str = "{prompt}\nPut the final answer into \\boxed{}."
    verifier: Verifier = "math"
    worked: bool = True


def build_gsm8k(options: Mapping[str, object]) -> Rows:
    """The test file's rows are held out."""
    settings = read_options(Gsm8kOptions, options, "gsm8k")

    def rows(split: str) -> list[Item]:
        return list(_read(settings.path, split, lambda row: _gsm8k(row, settings.worked)))

    return Rows("gsm8k", rows("train"), rows("test"), settings)


def build_math500(options: Mapping[str, object]) -> Rows:
    """MATH-500 has no rows to train on; ``ValueError`` when the options do not say where they come from."""
    settings = read_options(Math500Options, options, "math500")
    if (settings.train is None) == (settings.heldout_share is None):
        raise ValueError(
            "task.options of math500: it is a test set, so say what to train on: either train (a file of other "
            "problems) or heldout_share (train on the rest of it)"
        )

    def rows(path: str, split: str) -> list[Item]:
        return list(_read(path, split, lambda row: _math(row, settings.worked)))

    held = rows(settings.path, "test")
    if settings.train is not None:
        return Rows("math500", rows(settings.train, "train"), held, settings)
    assert settings.heldout_share is not None
    return Rows("math500", *split_items(held, settings.heldout_share), settings)


def _files(path: Path, split: str) -> list[Path]:
    """The file itself, or all files of the split in the folder.

    Raises:
        ValueError: there is none; a shard, or a subject of MATH, is missing; the split is there more than once.
    """
    if path.is_file():
        require_shards([path])
        return [path]
    # GSM8K's other configuration, in a folder beside the main one
    found = [f for f in split_files(path, split) if not any("socratic" in part for part in f.relative_to(path).parts)]
    if not found:
        raise ValueError(
            f"task.options.path: {path} holds no {split}.jsonl or {split}-*.parquet; give the folder of a local copy"
        )
    subjects = {part for f in found for part in f.relative_to(path).parts if part in SUBJECTS}
    if subjects and (missing := sorted(SUBJECTS - subjects)):
        raise ValueError(
            f"task.options: {path} lacks {', '.join(missing)} of MATH's {len(SUBJECTS)} subjects for {split}; copy it "
            "whole, or give the folder of one subject"
        )
    if len({suffix(f) for f in found}) > 1 or len({f.parent for f in found}) > max(1, len(subjects)):
        raise ValueError(
            f"task.options: {path} holds {split} more than once ({found[0]}, {found[-1]}); give the folder of one copy"
        )
    return found


def _read(path: str, split: str, read: Callable[[Row], dict[str, str]]) -> Iterator[Item]:
    for place, row in (placed for file in _files(Path(path), split) for placed in read_file(file)):
        try:
            ours = read(row)
        except KeyError as error:
            raise ValueError(
                f"{place}: no key {error}; is this another data set? It has {', '.join(map(repr, row))}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        yield Item(
            prompt=ours["prompt"],
            answers=(ours["answer"],),
            response=ours["response"],
            row={**row, **ours},
            place=place,
        )


def _gsm8k(row: Row, worked: bool) -> dict[str, str]:
    solution, marked, answer = str(row["answer"]).rpartition("####")
    if not marked:
        raise ValueError(f"the answer {str(row['answer'])[:60]!r} has no '####'; is this another data set?")
    answer = answer.strip().replace(",", "")
    if not last_number(answer):
        raise ValueError(f"the answer after '####' is {answer[:60]!r}, not a number; mend or remove the row")
    text = f"{_CALCULATOR.sub('', solution).strip()}\n#### {answer}"
    return {"prompt": str(row["question"]), "answer": answer, "response": text if worked else answer}


def _math(row: Row, worked: bool) -> dict[str, str]:
    solution = str(row["solution"])
    answer = str(row["answer"] if "answer" in row else last_box(solution) or "").strip()
    if not answer:
        raise ValueError(
            f"the solution has no \\boxed{{...}} with an answer: {solution[-60:]!r}; mend or remove the row"
        )
    return {"prompt": str(row["problem"]), "answer": answer, "response": solution if worked else answer}
