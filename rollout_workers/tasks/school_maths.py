"""``gsm8k`` and ``math500``: readers of a local copy, in the form in which they are published or in that of the Hugging
Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from configs.schema import PathStr
from rollout_workers.tasks.dataset_rows import Judging, OpenShare, Rows, split_items
from rollout_workers.tasks.row_files import Row, read_file, read_options
from rollout_workers.tasks.row_values import Item
from rollout_workers.tasks.scorer_options import Verifier

_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's notes for a calculator: ``48/2 = <<48/2=24>>24``."""
SUFFIXES = (".jsonl", ".parquet")


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
        return list(_read(_split_file(Path(settings.path), split), lambda row: _gsm8k(row, settings.worked)))

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
        return list(_read(_split_file(Path(path), split), lambda row: _math(row, settings.worked)))

    held = rows(settings.path, "test")
    if settings.train is not None:
        return Rows("math500", rows(settings.train, "train"), held, settings)
    assert settings.heldout_share is not None
    return Rows("math500", *split_items(held, settings.heldout_share), settings)


def _split_file(path: Path, split: str) -> Path:
    """The file itself, or the one in the folder that is named after the split (``test.jsonl``,
    ``test-00000-of-00001.parquet``)."""
    if path.is_file():
        return path
    found = [f for f in sorted(path.rglob("*")) if f.suffix in SUFFIXES and re.fullmatch(rf"{split}(-\d.*)?", f.stem)]
    # GSM8K's other configuration, in a folder beside the main one
    found = [f for f in found if "socratic" not in f.parts]
    if not found:
        raise ValueError(
            f"task.options.path: {path} holds no {split}.jsonl or {split}-*.parquet; give the folder of a local copy"
        )
    return found[0]


def _read(path: Path, read: Callable[[Row], dict[str, str]]) -> Iterator[Item]:
    for place, row in read_file(path):
        try:
            ours = read(row)
        except KeyError as error:
            raise ValueError(
                f"{place}: no key {error}; is this another data set? It has {', '.join(map(repr, row))}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        yield Item(prompt=ours["prompt"], answers=(ours["answer"],), response=ours["response"], row={**row, **ours})


def _gsm8k(row: Row, worked: bool) -> dict[str, str]:
    solution, marked, answer = str(row["answer"]).rpartition("####")
    if not marked:
        raise ValueError(f"the answer {str(row['answer'])[:60]!r} has no '####'; is this another data set?")
    answer = answer.strip().replace(",", "")
    text = f"{_CALCULATOR.sub('', solution).strip()}\n#### {answer}"
    return {"prompt": str(row["question"]), "answer": answer, "response": text if worked else answer}


def _math(row: Row, worked: bool) -> dict[str, str]:
    solution = str(row["solution"])
    answer = str(row["answer"]) if "answer" in row else last_boxed(solution)
    return {"prompt": str(row["problem"]), "answer": answer, "response": solution if worked else answer}


def last_boxed(text: str) -> str:
    r"""The content of the last ``\boxed{...}``, whose braces may nest; ``ValueError`` when there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 7 : place]
    raise ValueError(f"the solution has no \\boxed{{...}}: {text[-60:]!r}")
