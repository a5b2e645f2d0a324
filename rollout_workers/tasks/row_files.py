"""Reads options and rows: ``task.options`` into typed settings, and files of rows (JSON, CSV, Parquet) or a data set
into rows."""

from __future__ import annotations

import csv
import difflib
import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from configs.install import install_command
from configs.schema import Section

Row = dict[str, object]
M = TypeVar("M", bound=Section)
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Of files of rows; ``.gz`` may follow."""
WANTED = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
_LONGEST_FIELD = 1 << 27
EXTRA = install_command("tasks")


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


def row_files(path: Path) -> list[Path]:
    """The file at ``path``, or the files of rows of a folder, searched to the bottom, sorted; ``ValueError`` when there
    is none."""
    if path.is_file():
        return [path]
    found = sorted(f for f in path.rglob("*") if f.is_file() and suffix(f) in SUFFIXES) if path.is_dir() else []
    if not found:
        raise ValueError(
            f"{path} {f'holds no {WANTED} file' if path.is_dir() else 'does not exist or is no file'}; set "
            f"task.options.path to a {WANTED} file or a folder of them"
        )
    require_shards(found)
    return found


def require_shards(files: Sequence[Path]) -> None:
    """``ValueError`` names the shards that files such as ``train-00000-of-00005.parquet`` lack."""
    series: dict[tuple[Path, str, str], set[int]] = {}
    for file in files:
        if shard := re.fullmatch(r"(.*?)(\d{2,})-of-(\d{2,}).*", file.name):
            series.setdefault((file.parent, shard[1], shard[3]), set()).add(int(shard[2]))
    for (folder, name, of), numbers in series.items():
        missing = [f"{name}{n:0{len(of)}}-of-{of}" for n in range(int(of)) if n not in numbers]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"{folder} lacks {', '.join(missing[:3])}{more} of {int(of)} shards; copy them, and give the folder"
            )


def suffix(path: Path) -> str:
    """Of the file's name, in small letters, ``.gz`` aside."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def split_files(folder: Path, split: str) -> list[Path]:
    """The folder's files of rows that lie in a folder named after the split, or are (``test.jsonl``,
    ``test-00000-of-00001.parquet``)."""
    named = re.compile(rf"{re.escape(split)}([-_.].*)?")
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and suffix(f) in SUFFIXES]
    found = [f for f in files if any(named.fullmatch(part) for part in f.relative_to(folder).parts)]
    require_shards(found)
    return found


def read_file(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row of a file, or of each file of a folder; all rows of this house are read here.

    By the file's suffix: .csv and .tsv (all values are texts), .json (an array, an object that holds one, or lines),
    .parquet (only ``columns``, where it has them); any other is JSON lines. ``.gz`` may follow. Values are as in the
    file: whole numbers of any size, decimals and dates stay what they are.

    Raises:
        ValueError: names file, line or row, value and remedy.
    """
    for file in row_files(path):
        kind = suffix(file)
        try:
            if kind == ".parquet":
                yield from _parquet(file, columns)
            elif kind in (".csv", ".tsv"):
                yield from _csv(file, kind)
            else:
                yield from _json(file, kind)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file} is no whole .gz file: {error}; write it again, or remove it") from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that an error names its line; a byte order mark is no part of the text."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
                ) from error


def _json(path: Path, kind: str) -> Iterator[tuple[str, Row]]:
    """Lines; or one document where the first line begins an array or, in a .json file, is no object of its own."""
    read = lines(path)
    first = next(((number, line) for number, line in read if line.strip()), None)
    if first is not None and (first[1].lstrip().startswith("[") or (kind == ".json" and not _whole(first[1]))):
        yield from _document(path, first[1] + "".join(line for _, line in read))
        return
    for number, line in itertools.chain([first] if first else [], read):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _row(_parsed(line, place, "line"), place, "line")


def _whole(line: str) -> bool:
    """Whether the line is a row; an object that is nothing but a list of rows is a document."""
    try:
        return not _listed(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _listed(value: object) -> list[Any] | None:
    """The only list of objects in a document such as ``{"version": "1.1", "data": [{...}, ...]}``."""
    found = [v for v in value.values() if isinstance(v, list) and v] if isinstance(value, dict) else []
    return found[0] if len(found) == 1 and all(isinstance(child, dict) for child in found[0]) else None


def _document(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    found = _parsed(text, str(path), "file")
    rows = found if isinstance(found, list) else _listed(found)
    if isinstance(found, dict) and found and not any(isinstance(value, dict | list) for value in found.values()):
        rows = [found]  # a file for each row, as MATH is published
    if rows is None:
        shown = ", ".join(map(repr, found)) if isinstance(found, dict) else repr(found)
        raise ValueError(
            f"{path}: one object with {shown:.80}, not rows; write an array of objects, or one object a line (pandas: "
            "orient='records')"
        )
    for count, row in enumerate(rows, 1):
        yield f"{path}, row {count}", _row(row, f"{path}, row {count}", "row")


def _parsed(text: str, place: str, unit: str) -> object:
    try:
        value: object = json.loads(text, object_pairs_hook=_pairs, parse_int=_integer)
        json.dumps(value, ensure_ascii=False).encode()  # JSON can spell halves of characters, which no text has
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}): {text.strip()[:60]!r}; mend or remove the {unit}") from error
    return value


def _pairs(pairs: list[tuple[str, object]]) -> Row:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"key {twice[0]!r} stands there twice")
    return dict(pairs)


def _integer(digits: str) -> int:
    if len(digits) > 4300:  # as Python's int() does, whose message advises a call
        raise ValueError(f"a whole number of {len(digits)} digits; write it as a text")
    return int(digits)


def _row(value: object, place: str, unit: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a JSON object is wanted, not {value!r:.60}; mend or remove the {unit}")
    return value


def _csv(path: Path, kind: str) -> Iterator[tuple[str, Row]]:
    """Rows of a file with a header; fields may hold line breaks within quotes."""
    csv.field_size_limit(_LONGEST_FIELD)
    read = (line for _, line in lines(path))
    header = next(read, "")
    delimiter = "\t" if kind == ".tsv" else max(",;\t", key=header.count)
    table = csv.reader(itertools.chain([header], read), delimiter=delimiter, strict=True)
    names: list[str] = []
    before = 0
    try:
        for fields in table:
            place, before = f"{path}, line {before + 1}", table.line_num
            if names and len(fields) == len(names):
                yield place, dict(zip(names, fields, strict=True))
            elif names and fields:
                raise ValueError(
                    f"{place}: {len(fields)} fields, but the header has {len(names)}: {fields!r:.60}; mend or remove "
                    "the line"
                )
            elif not names:
                names = fields
                if len(set(names)) < len(names) or not all(names):
                    raise ValueError(f"{place}: the header {names!r:.80} needs one name for each column; mend it")
    except csv.Error as error:
        raise ValueError(f"{path}, line {table.line_num}: not CSV ({error}); mend or remove the line") from error


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as data:
            file = pyarrow.parquet.ParquetFile(data)
            wanted = columns if columns is None or set(columns) <= set(file.schema_arrow.names) else None
            count = itertools.count(1)
            for batch in file.iter_batches(batch_size=256, columns=wanted, use_threads=False):
                for row in _typed(batch):
                    yield f"{path}, row {next(count)}", row
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | gzip.BadGzipFile):
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a readable Parquet file: {reason}; write it again or remove it") from error


def _typed(batch: Any) -> list[Row]:
    """The rows of an Arrow batch; a narrow float becomes the shortest decimal that says it: 0.1, not 0.10000000149."""
    import numpy
    import pyarrow

    rows: list[Row] = batch.to_pylist()
    narrow = {pyarrow.float32(): numpy.float32, pyarrow.float16(): numpy.float16}
    for field in (field for field in batch.schema if field.type in narrow):
        for row in rows:
            if row[field.name] is not None:
                row[field.name] = float(str(narrow[field.type](row[field.name])))
    return rows


def read_dataset(source: str, subset: str | None, split: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of a split of a Hugging Face data set: a ``save_to_disk`` folder, a folder of files named after
    their splits, or what ``load_dataset`` takes."""
    if subset is None and not saved_dataset(Path(source)) and (files := split_files(Path(source), split)):
        yield from itertools.chain.from_iterable(map(read_file, files))
        return
    found = dataset_splits(source, subset)
    if split not in found:
        raise ValueError(f"task.options: the data set {source} has no split {split!r}; {near(split, sorted(found))}")
    count = itertools.count(1)
    for batch in found[split].with_format("arrow").iter(batch_size=256):
        for row in _typed(batch):
            yield f"{source}, {split} row {next(count)}", row


def dataset_splits(source: str, subset: str | None = None) -> Mapping[str, Any]:
    """The splits of a Hugging Face data set by name; ``ValueError`` where there is none, or no package to read it."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"task dataset needs the package datasets, which is not installed; {EXTRA}") from error
    try:
        found: Any = (
            datasets.load_from_disk(source) if saved_dataset(Path(source)) else datasets.load_dataset(source, subset)
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"task.options.path: no data set to be had from {source!r}: {error}".partition("\n")[0]
        ) from error
    return found if isinstance(found, Mapping) else {"train": found}  # a folder saved from a single split


def saved_dataset(path: Path) -> bool:
    """Whether ``datasets``' ``save_to_disk`` wrote the folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))
