"""Rows of a few kilobytes that claim gigabytes: each is refused by file, line, limit and remedy, in bounded memory.

Oracle: the peak of a process of its own, by the system."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.schema import TaskConfig
from rollout_workers.tasks import build_task, row_limits
from rollout_workers.tasks.row_files import read_file
from rollout_workers.tasks.row_limits import bounded_rows

ROOT = Path(__file__).resolve().parents[2]
READ = """
import json, resource, sys
from configs.schema import TaskConfig
from rollout_workers.tasks import build_task
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    build_task(TaskConfig(name="rows", options=json.loads(sys.argv[1])))
    said = "taken"
except ValueError as error:
    said = str(error)
print(json.dumps([said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10]))
"""
ROW = json.dumps({"prompt": "a", "answer": "b"}) + "\n"


def holes(path: Path, start: bytes) -> None:
    """Five gigabytes without an end of line, which take no room on the disk."""
    path.write_bytes(start)
    with path.open("r+b") as file:
        file.truncate(5 << 30)


def long_line(path: Path, start: bytes) -> None:
    """150 MiB without an end of line."""
    path.write_bytes(start + b"x" * (150 << 20))


def repeated(path: Path, start: bytes, again: bytes, times: int) -> None:
    """Members of a .gz file follow one another."""
    path.write_bytes(gzip.compress(start) + gzip.compress(again) * times)


def dictionary(path: Path) -> None:
    """The same 8 MiB text in each of 5000 rows."""
    rows = 5000
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * (8 << 20)]))
    table = pa.table({"prompt": texts, "answer": ["1"] * rows})
    pq.write_table(table, path, compression="zstd", row_group_size=rows)


BOMBS: dict[str, tuple[Callable[[Path], None], str]] = {
    "holes.jsonl": (lambda p: holes(p, b'{"a": "'), "holes.jsonl is not text"),
    "line.jsonl": (lambda p: long_line(p, b'{"a": "'), "line.jsonl, line 1: longer than 128 MiB"),
    "line.json": (lambda p: long_line(p, b"["), "line.json, line 1: longer than 128 MiB"),
    "line.csv": (lambda p: long_line(p, b"prompt,answer\n"), "line.csv, line 2: longer than 128 MiB"),
    "line.jsonl.gz": (
        lambda p: repeated(p, b'{"a": "', b"x" * (16 << 20), 400),
        "line.jsonl.gz, line 1: longer than 128 MiB",
    ),
    "field.csv.gz": (
        lambda p: repeated(p, b'prompt,answer\n"', (b"x" * 1023 + b"\n") * 4096, 400),
        "field limit (134217728)",
    ),
    "rows.jsonl.gz": (
        lambda p: repeated(p, b"", ROW.encode() * 100_000, 300),
        "take more than task.options.max_gib = 0.05 GiB of memory in each process; raise it, or leave rows out",
    ),
    "rows.csv.gz": (lambda p: repeated(p, b"prompt,answer\n", b"a,b\n" * 100_000, 300), "task.options.max_gib"),
    "file.parquet.gz": (
        lambda p: repeated(p, b"PAR1", b"\0" * (16 << 20), 400),
        "file.parquet.gz: more than 1024 MiB without .gz",
    ),
    "dictionary.parquet": (dictionary, "task.options.max_gib"),
}


SLOW = ("field.csv.gz", "file.parquet.gz")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in BOMBS])
def test_a_small_file_that_says_gigabytes(tmp_path: Path, name: str) -> None:
    write, words = BOMBS[name]
    write(tmp_path / name)
    options = json.dumps({"path": str(tmp_path / name), "max_gib": 0.05})
    line = [sys.executable, "-c", READ, options]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    said, mib = json.loads(done.stdout)
    assert words in said and name in said and mib < 1500


def test_a_document_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "a", "answer": "b"}] * 100, indent=1))
    assert len(list(read_file(path))) == 100
    for name in ("LARGEST", "MOST_VALUES"):
        with monkeypatch.context() as patch:
            patch.setattr(row_limits, name, 150)
            with pytest.raises(ValueError, match=r"a\.json: one JSON document of more than .*one object a line"):
                list(read_file(path))


def test_values_of_a_row_group_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "ids": [[7] * 1000]}), path)
    assert len(list(read_file(path))) == 1
    monkeypatch.setattr(row_limits, "MOST_VALUES", 999)
    with pytest.raises(ValueError, match=r"row group 0 has 1,000 values in ids\.list\.element, more than 999; write"):
        list(read_file(path))


def test_the_limit_is_of_what_rows_take_in_python() -> None:
    """200 rows of 10,000 characters are 2 MB."""
    rows = [(f"row {i}", {"prompt": "x" * 10_000, "meta": {"tags": ["y"] * 3}}) for i in range(200)]
    assert list(bounded_rows(rows, 0.01)) == rows
    with pytest.raises(ValueError, match=r"row (8|9)\d: \d+ rows up to here take more than .*max_gib = 0\.001 GiB"):
        list(bounded_rows(rows, 0.001))


def test_the_limit_can_be_raised(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "answer": "b"}) + "\n" for i in range(2000)))
    with pytest.raises(ValueError, match=r"task\.options\.max_gib = 0\.001 GiB"):
        build_task(TaskConfig(name="rows", options={"path": str(path), "max_gib": 0.001}))
    assert build_task(TaskConfig(name="rows", options={"path": str(path), "max_gib": 0.1}))
