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
from typing import IO, Any, TypeVar, cast

from pydantic import ValidationError

from configs.install import install_command
from configs.schema import Section
from rollout_workers.tasks.row_kinds import HEAD, foreign_kind
from rollout_workers.tasks.row_limits import LARGEST, LONGEST, batch_rows, require_whole, whole_document

Row = dict[str, object]
M = TypeVar("M", bound=Section)
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Of files of rows; ``.gz`` may follow."""
WANTED = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
SPLITS = ("train", "test", "validation", "valid", "dev")
"""What files of a split are named after."""
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
        raise ValueError(f"{place} is not an option of {task}; {near(key, list(owner.model_fields) if owner else [])}")
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
            f"{path} {f'holds no {WANTED} file' if path.is_dir() else 'does not exist or is not a file'}; set "
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


def single_split(path: Path) -> None:
    """``ValueError`` where the files of a folder are named after several splits, which would be read as one."""
    if path.is_dir() and len(found := [name for name in SPLITS if split_files(path, name)]) > 1:
        raise ValueError(
            f"task.options.path: {path} holds files of several splits ({', '.join(found)}), of which one is to be "
            f"trained on; set task.name: dataset with task.options.split: {found[0]} and heldout_split: {found[1]}, or "
            "give the files of one"
        )


def read_file(
    path: Path, columns: Sequence[str] | None = None, *, class_names: bool = False
) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row of a file, or of each file of a folder; all rows of this house are read here.

    By the file's suffix: .csv and .tsv (all values are texts), .json (an array, an object that holds one, or lines),
    .parquet (only ``columns``, where it has them); any other is JSON lines. ``.gz`` may follow. Values are as in the
    file: whole numbers of any size, decimals and dates stay what they are; with ``class_names``, class labels of
    Hugging Face's ``datasets`` are names instead of numbers.

    Raises:
        ValueError: names file, line or row, value and remedy.
    """
    for file in row_files(path):
        kind = suffix(file)
        try:
            if kind == ".parquet":
                yield from _parquet(file, columns, class_names)
            elif kind in (".csv", ".tsv"):
                yield from _csv(file, kind)
            else:
                yield from _json(file, kind)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file} is not a whole .gz file: {error}; write it again, or remove it") from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that an error names its line; a byte order mark is no part of the text."""
    with _opened(path) as file:
        if kind := foreign_kind(file.read(HEAD), rows=suffix(path) != ".txt"):
            raise ValueError(f"{path} {kind}")
        file.seek(0)
        for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
            require_whole(line, f"{path}, line {number}")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
                ) from error


def _opened(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")


def _json(path: Path, kind: str) -> Iterator[tuple[str, Row]]:
    """Lines; or one document where the first line begins an array or, in a .json file, is no object of its own."""
    read = ((number, line) for number, line in lines(path) if line.strip())
    begin = list(itertools.islice(read, 2))
    every = itertools.chain(begin, read)
    if begin and (
        begin[0][1].lstrip().startswith("[") or (kind == ".json" and not _whole(begin[0][1], len(begin) == 1))
    ):
        yield from _document(path, whole_document(path, (line for _, line in every)))
        return
    for number, line in every:
        place = f"{path}, line {number}"
        yield place, _row(_parsed(line, place, "line"), place, "line")


def _whole(line: str, alone: bool) -> bool:
    """Whether the line is a row; an object that holds a list of rows, or columns, and stands there alone, is a
    document."""
    try:
        value = json.loads(line)
        return not alone or not (_listed(value) or _turned(value))
    except (ValueError, RecursionError):
        return False


def _turned(value: object) -> bool:
    """Whether an object is a table by column (``{"q": ["x", "y"], "a": ["1", "2"]}``), by index (``{"0": {"q": "x",
    "a": "1"}, "1": ...}``), or several (``{"train": [{"q": "x"}], "test": [{"q": "y"}]}``)."""
    children = list(value.values()) if isinstance(value, dict) else []
    if len(children) < 2 or not all(isinstance(child, type(children[0])) and child for child in children):
        return False
    if isinstance(children[0], dict):
        return all(child.keys() == children[0].keys() for child in children)
    inner = [each for child in children if isinstance(child, list) for each in child]
    if inner and all(isinstance(each, dict) and each.keys() == inner[0].keys() for each in inner):
        return True
    alike = isinstance(children[0], list) and len({len(child) for child in children}) == 1 < len(children[0])
    return alike and not any(isinstance(each, list | dict) for child in children for each in child)


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
        raise ValueError(f"key {twice[0]!r} occurs twice")
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
    csv.field_size_limit(LONGEST)
    read = (line for _, line in lines(path))
    header = next(read, "")
    told = re.match(r"sep=(.)\s*$", header)  # a line of Excel's own
    header = next(read, "") if told else header
    delimiter = "\t" if kind == ".tsv" else told[1] if told else max(",;\t|", key=header.count)
    table = csv.reader(itertools.chain([header], read), delimiter=delimiter, strict=True)
    names: list[str] = []
    before = 0
    try:
        for fields in table:
            place, before = f"{path}, line {before + 1 + bool(told)}", table.line_num
            if names and len(fields) == len(names):
                yield place, dict(zip(names, fields, strict=True))
            elif names and fields:
                raise ValueError(
                    f"{place}: {len(fields)} fields, but the header has {len(names)}: {fields!r:.60}; mend or remove "
                    "the line"
                )
            elif not names:
                names = [name or f"column {number}" for number, name in enumerate(fields, 1)]  # pandas' index has none
                if len(set(names)) < len(names):
                    raise ValueError(f"{place}: the header {names!r:.80} needs one name for each column; mend it")
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {table.line_num + bool(told)}: not CSV ({error}); mend or remove the line"
        ) from error


def _parquet(path: Path, columns: Sequence[str] | None, class_names: bool) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _opened(path) as data:
            if suffix(path) != path.suffix.lower() and data.seek(LARGEST + 1) > LARGEST:
                raise ValueError(f"{path}: more than {LARGEST >> 20} MiB without .gz; Parquet compresses by itself")
            file = pyarrow.parquet.ParquetFile(data)
            names = file.schema_arrow.names
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{path}: column {twice[0]!r} occurs twice; write each under its own name")
            wanted = columns if columns is None or set(columns) <= set(names) else None
            count = itertools.count(1)
            for batch in file.iter_batches(batch_rows(path, file.metadata), columns=wanted, use_threads=False):
                for row in _typed(batch, class_names):
                    yield f"{path}, row {next(count)}", row
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | gzip.BadGzipFile):
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a readable Parquet file: {reason}; write it again or remove it") from error


def _typed(batch: Any, class_names: bool) -> list[Row]:
    """The rows of an Arrow batch; a narrow float becomes the shortest decimal that says it: 0.1, not 0.10000000149."""
    rows: list[Row] = batch.to_pylist()
    for field in (field for field in batch.schema if "float" in str(field.type)):  # Arrow calls 64 bits double
        for row in rows:
            row[field.name] = _shortest(row[field.name], field.type)
    for name, names in _classes(batch.schema).items() if class_names else ():
        for row in rows:
            if isinstance(number := row.get(name), int) and 0 <= number < len(names):
                row[name] = names[number]
    return rows


def _shortest(value: Any, kind: Any) -> Any:
    """A value of an Arrow type, and of its members."""
    import numpy
    import pyarrow.types as types

    if value is None:
        return None
    if types.is_float32(kind) or types.is_float16(kind):
        return float(str((numpy.float32 if types.is_float32(kind) else numpy.float16)(value)))
    if types.is_struct(kind):
        return {field.name: _shortest(value[field.name], field.type) for field in kind}
    if types.is_map(kind):
        return [(key, _shortest(child, kind.item_type)) for key, child in value]
    if types.is_dictionary(kind):
        return _shortest(value, kind.value_type)
    return [_shortest(child, kind.value_type) for child in value] if isinstance(value, list) else value


def _classes(schema: Any) -> dict[str, list[str]]:
    """Names of the class labels, by column, as ``datasets`` writes them into what it saves."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"null"))["info"]["features"]
        labels = {name: feature["names"] for name, feature in features.items() if feature["_type"] == "ClassLabel"}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: list(map(str, names)) for name, names in labels.items() if isinstance(names, list)}


def read_dataset(
    source: str, subset: str | None, split: str, *, class_names: bool = False
) -> Iterator[tuple[str, Row]]:
    """(place, row) of a split of a Hugging Face data set: a ``save_to_disk`` folder, a folder of files named after
    their splits (of its folder ``subset``, where there is one), or what ``load_dataset`` takes."""
    folder = Path(source, subset or "")
    if folder.is_dir() and not saved_dataset(Path(source)) and (files := split_files(folder, split)):
        for file in files:
            yield from read_file(file, class_names=class_names)
        return
    found = dataset_splits(source, subset)
    if split not in found:
        raise ValueError(f"task.options: the data set {source} has no split {split!r}; {near(split, sorted(found))}")
    count = itertools.count(1)
    for batch in found[split].with_format("arrow").iter(batch_size=256):
        for row in _typed(batch, class_names):
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
