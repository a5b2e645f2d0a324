"""``gsm8k`` and ``math500``: readers of a local copy, in the form in which they are published or in that of the Hugging
Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from configs.schema import PathStr
from rollout_workers.judging.numerals import last_number
from rollout_workers.judging.texts import last_box
from rollout_workers.tasks.dataset_rows import Judging, OpenShare, Rows
from rollout_workers.tasks.protocol import Split, split_of
from rollout_workers.tasks.published import split_files
from rollout_workers.tasks.row_files import Row, read_file, read_options
from rollout_workers.tasks.scorer_options import Verifier

_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's notes for a calculator: ``48/2 = <<48/2=24>>24``."""


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

    def rows(split: str) -> list[Row]:
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

    def rows(path: str, split: str) -> list[Row]:
        return list(_read(path, split, lambda row: _math(row, settings.worked)))

    held = rows(settings.path, "test")
    if settings.train is not None:
        return Rows("math500", rows(settings.train, "train"), held, settings)
    assert settings.heldout_share is not None
    falls: dict[Split, list[Row]] = {"train": [], "heldout": []}
    for row in held:
        falls[split_of(str(row["prompt"]), settings.heldout_share)].append(row)
    return Rows("math500", falls["train"], falls["heldout"], settings)


def _read(path: str, split: str, read: Callable[[Row], Row]) -> Iterator[Row]:
    for place, row in (placed for file in split_files(Path(path), split) for placed in read_file(file)):
        try:
            yield read(row)
        except KeyError as error:
            raise ValueError(
                f"{place}: no key {error}; is this another data set? It has {', '.join(map(repr, row))}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _gsm8k(row: Row, worked: bool) -> Row:
    solution, marked, answer = str(row["answer"]).rpartition("####")
    if not marked:
        raise ValueError(f"the answer {str(row['answer'])[:60]!r} has no '####'; is this another data set?")
    answer = answer.strip().replace(",", "")
    if not last_number(answer):
        raise ValueError(f"the answer after '####' is {answer[:60]!r}, not a number; mend or remove the row")
    text = f"{_CALCULATOR.sub('', solution).strip()}\n#### {answer}"
    return {"prompt": str(row["question"]), "answer": answer, "response": text if worked else answer}


def _math(row: Row, worked: bool) -> Row:
    solution = str(row["solution"])
    answer = row.get("answer") or last_box(solution)
    if answer is None or not str(answer).strip():
        raise ValueError(f"the solution has no \\boxed{{...}} with an answer: {solution[-60:]!r}; mend or remove the row")
    answer = str(answer).strip()
    more: Row = {key: row[key] for key in ("subject", "type", "level") if key in row}
    return {"prompt": str(row["problem"]), "answer": answer, "response": solution if worked else answer, **more}
