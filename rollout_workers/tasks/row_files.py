"""Reads options and rows: ``task.options`` into typed settings, and ``.jsonl``, ``.parquet`` or a data set into
rows."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from configs.schema import Section

Row = dict[str, object]
M = TypeVar("M", bound=Section)
EXTRA = "pip install -c requirements.lock -e '.[tasks]'"


def near(word: str, known: Sequence[str]) -> str:
    """``did you mean 'x'?``, or what there is."""
    found = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {found[0]!r}?" if found else f"known: {', '.join(known)}"


def read_options(kind: type[M], options: Mapping[str, object], task: str) -> M:
    """Checked options of a task; ``ValueError`` names the first that is unknown, missing or out of range."""
    try:
        return kind.model_validate_json(json.dumps(options, default=str), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    *parents, key = (str(part) for part in first["loc"]) if first["loc"] else ("",)
    place = ".".join(["task.options", *parents, key]).rstrip(".")
    if first["type"] == "extra_forbidden":
        owner: Any = kind
        for parent in (p for p in parents if not p.isdecimal()):
            owner = next(
                (a for a in _annotations(owner, parent) if isinstance(a, type) and issubclass(a, Section)), None
            )
        raise ValueError(f"{place} is no option of {task}; {near(key, list(owner.model_fields) if owner else [])}")
    if first["type"] == "missing":
        raise ValueError(f"{place} of {task} is missing; give it a value")
    said = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    raise ValueError(
        f"{place} of {task} is {first['input']!r:.80}; it must be {said}" if parents or key else f"{task}: {said}"
    )


def _annotations(owner: type[Section] | None, name: str) -> tuple[Any, ...]:
    if owner is None or name not in owner.model_fields:
        return ()
    annotation = owner.model_fields[name].annotation
    return getattr(annotation, "__args__", (annotation,))


def read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row of a ``.jsonl`` or ``.parquet`` file; ``ValueError`` names file, line and remedy."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file; set task.options.path to a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    with path.open("rb") as file:
        for count, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {count}", _json_row(line, f"{path}, line {count}")


def _json_row(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()  # JSON can spell halves of characters, which no text has
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: no JSON in UTF-8 ({error}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a JSON object is wanted, not {str(row)[:60]!r}; mend or remove the line")
    return row


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            count = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    count += 1
                    yield f"{path}, row {count}", row
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path} is no readable Parquet file: {error}") from error


def read_dataset(source: str, subset: str | None, split: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of a split of a Hugging Face data set: a ``save_to_disk`` folder, or what ``load_dataset`` takes."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"task dataset needs the package datasets, which is not installed; {EXTRA}") from error
    try:
        found: Any = datasets.load_from_disk(source) if _saved(Path(source)) else datasets.load_dataset(source, subset)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"task.options.path: no data set to be had from {source!r}: {error}".partition("\n")[0]
        ) from error
    if not isinstance(found, Mapping):  # a folder saved from a single split
        found = {"train": found}
    if split not in found:
        raise ValueError(f"task.options: the data set {source} has no split {split!r}; {near(split, sorted(found))}")
    for count, row in enumerate(found[split], 1):
        yield f"{source}, {split} row {count}", dict(row)


def _saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))
