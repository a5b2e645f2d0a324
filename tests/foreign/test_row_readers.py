"""One reader of rows: every kind of file gives the same rows, values as they stand there; what is damaged is named by
file, line, value and remedy. Also as text sources of the offline stages, which read by the same."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.schema import TaskConfig
from pipeline.data.text_files import read_texts, text_files
from rollout_workers.tasks import build_task
from rollout_workers.tasks.row_files import read_file

ROWS: list[dict[str, Any]] = [{"text": f"{i} \u2028 \u0085 é", "n": str(i)} for i in range(5)]


def lined(rows: list[dict[str, Any]], end: str = "\n") -> str:
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end


def table(rows: list[dict[str, Any]], between: str) -> str:
    return "\r\n".join(
        between.join(f'"{value}"' for value in row.values()) for row in [{"text": "text", "n": "n"}, *rows]
    )


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda p: p.write_text(lined(ROWS)),
    "blank lines.jsonl": lambda p: p.write_text("\n \n" + lined(ROWS, "\n\n\t\n")),
    "bom crlf.jsonl": lambda p: p.write_bytes(lined(ROWS, "\r\n").encode("utf-8-sig")),
    "no final newline.ndjson": lambda p: p.write_text(lined(ROWS).rstrip("\n")),
    "unknown suffix.data": lambda p: p.write_text(lined(ROWS)),
    "LOUD.JSONL": lambda p: p.write_text(lined(ROWS)),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lined(ROWS).encode())),
    "lines.json": lambda p: p.write_text(lined(ROWS)),
    "array.json": lambda p: p.write_text(json.dumps(ROWS)),
    "pretty array.json": lambda p: p.write_bytes(json.dumps(ROWS, indent=2).encode("utf-8-sig")),
    "array of lines.jsonl": lambda p: p.write_text(json.dumps(ROWS, indent=1)),
    "document.json": lambda p: p.write_text(json.dumps({"version": "1.1", "data": ROWS})),
    "pretty document.json": lambda p: p.write_text(json.dumps({"version": "1.1", "data": ROWS}, indent=1)),
    "array.json.gz": lambda p: p.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.csv": lambda p: p.write_text(table(ROWS, ",")),
    "excel.csv": lambda p: p.write_bytes(table(ROWS, ";").encode("utf-8-sig")),
    "a.tsv": lambda p: p.write_text(table(ROWS, "\t")),
    "told by Excel.csv": lambda p: p.write_text("sep=;\r\n" + table(ROWS, ";")),
    "pipes.csv": lambda p: p.write_text(table(ROWS, "|")),
    "a.csv.gz": lambda p: p.write_bytes(gzip.compress(table(ROWS, ",").encode())),
    "a.parquet": lambda p: pq.write_table(pa.Table.from_pylist(ROWS), p),
    "row groups.parquet": lambda p: pq.write_table(pa.Table.from_pylist(ROWS), p, row_group_size=2),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert [row for _, row in read_file(tmp_path / name)] == ROWS
    assert len({place for place, _ in read_file(tmp_path / name)}) == len(ROWS)
    if "unknown" not in name:
        assert text_files(tmp_path) == [tmp_path / name]
        assert list(read_texts(tmp_path / name, "text")) == [row["text"] for row in ROWS]


def test_a_folder_of_shards_is_read_whole(tmp_path: Path) -> None:
    for number, suffix in enumerate(("parquet", "jsonl", "csv")):
        WRITERS[f"a.{suffix}"](tmp_path / f"part-{number}.{suffix}")
    (tmp_path / "README.md").write_text("about")
    assert [row for _, row in read_file(tmp_path)] == ROWS * 3
    with pytest.raises(ValueError, match=r"empty holds no \.jsonl, .*set task\.options\.path"):
        (tmp_path / "empty").mkdir()
        list(read_file(tmp_path / "empty"))


def test_json_lines_whose_rows_hold_one_list_are_rows_in_a_json_file(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(3)]
    (tmp_path / "chats.json").write_text(lined(rows, "\n\n"))
    assert [row for _, row in read_file(tmp_path / "chats.json")] == rows
    (tmp_path / "chats.json").write_text(json.dumps({"data": rows}))
    assert [row for _, row in read_file(tmp_path / "chats.json")] == rows


def test_narrow_floats_are_the_shortest_decimal_wherever_they_lie(tmp_path: Path) -> None:
    kind = pa.struct([("list", pa.list_(pa.float32())), ("map", pa.map_(pa.string(), pa.float16())), ("n", pa.int8())])
    value = {"list": [0.1, None, 1e-7], "map": [("a", 0.2), ("b", None)], "n": None}
    pq.write_table(pa.table({"x": pa.array([value, None], kind)}), tmp_path / "a.parquet")
    assert [row["x"] for _, row in read_file(tmp_path / "a.parquet")] == [value, None]


def test_a_parquet_column_twice_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: column 'a' occurs twice; write"):
        list(read_file(tmp_path / "a.parquet"))


def test_csv_is_text_as_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('q,a\r\n"two\r\nlines, ""quoted""",007\r\nx,\r\n\r\n1e3,NA\r\n', newline="")
    assert [row for _, row in read_file(tmp_path / "a.csv")] == [
        {"q": 'two\r\nlines, "quoted"', "a": "007"},
        {"q": "x", "a": ""},
        {"q": "1e3", "a": "NA"},
    ]


def test_csv_columns_without_a_name_are_numbered(tmp_path: Path) -> None:
    """pandas' index, and what a comma at the end of each line makes."""
    (tmp_path / "a.csv").write_text(",q,a,\n0,x,1,\n1,y,2,\n")
    rows = [row for _, row in read_file(tmp_path / "a.csv")]
    first, second = {"column 1": "0", "q": "x", "a": "1"}, {"column 1": "1", "q": "y", "a": "2"}
    assert rows == [first | {"column 4": ""}, second | {"column 4": ""}]


def test_a_single_row_of_a_json_file_is_no_table(tmp_path: Path) -> None:
    for row in ({"q": "x", "a": ["1", "2"]}, {"messages": [{"role": "user"}], "tools": [{}]}, {"q": {"a": 1}, "b": 2}):
        (tmp_path / "one.json").write_text(json.dumps(row))
        assert [found for _, found in read_file(tmp_path / "one.json")] in ([row], [{"role": "user"}])


def test_json_values_are_exact(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"a": 123456789012345678901234567890, "b": NaN, "c": 1.0, "d": true, "e": null}\n'
    )
    ((_, row),) = read_file(tmp_path / "a.jsonl")
    assert row["a"] == 123456789012345678901234567890 and row["b"] != row["b"]
    assert (row["c"], row["d"], row["e"]) == (1.0, True, None) and type(row["c"]) is float


def zipped(*names: str) -> bytes:
    with zipfile.ZipFile(made := io.BytesIO(), "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return made.getvalue()


BAD: dict[str, tuple[str | bytes, str]] = {
    "twice.jsonl": (
        '{"a": 1}\n{"a": 1, "a": 2}\n',
        r"twice.jsonl, line 2: not JSON \(key 'a' occurs twice\): .*mend",
    ),
    "nested twice.jsonl": ('{"a": {"b": 1, "b": 2}}\n', r"line 1: not JSON \(key 'b' occurs twice\)"),
    "long.jsonl": (
        '{"a": ' + "9" * 5000 + "}\n",
        r"long.jsonl, line 1: .*whole number of 5000 digits; write it as a text",
    ),
    "half.jsonl": ('{"a": "\\ud800"}\n', r"half.jsonl, line 1: not JSON .*surrogates.*mend or remove the line"),
    "deep.jsonl": ('{"a": ' + "[" * 100_000 + "}\n", r"deep.jsonl, line 1: not JSON"),
    "cut.jsonl": ('{"a": 1}\n\n{"a": ', r"cut.jsonl, line 3: not JSON .*'\{\"a\":'; mend or remove the line"),
    "text.jsonl": ('{"a": 1}\nhello\n', r"text.jsonl, line 2: not JSON .*'hello'"),
    "number.jsonl": ('{"a": 1}\n7\n', r"number.jsonl, line 2: a JSON object is wanted, not 7; mend"),
    "two in a line.jsonl": ('{"a": 1} {"a": 2}\n', r"line 1: not JSON \(Extra data"),
    "latin.jsonl": ('{"a": "é"}\n'.encode("latin-1"), r"latin.jsonl, line 1: not UTF-8 .*save the file as UTF-8"),
    "wide.jsonl": ('{"a": 1}\n'.encode("utf-16"), r"wide.jsonl is UTF-16 or UTF-32, not UTF-8; save .*UTF-8"),
    "wide.csv": ("a,b\r\n1,2\r\n".encode("utf-16"), r"wide.csv is UTF-16 .*in Excel: CSV UTF-8"),
    "wider.json": ('[{"a": 1}]'.encode("utf-32"), r"wider.json is UTF-16 or UTF-32"),
    "no mark.tsv": ("a\tb\n1\t2\n".encode("utf-16-le"), r"no mark.tsv is UTF-16 or UTF-32, not UTF-8"),
    "wide.jsonl.gz": (gzip.compress('{"a": 1}\n'.encode("utf-16")), r"wide.jsonl.gz is UTF-16"),
    "sheet.xlsx": (zipped("[Content_Types].xml", "xl/workbook.xml"), r"sheet.xlsx is an Excel workbook .*as CSV UTF-8"),
    "sheet.csv": (zipped("xl/workbook.xml"), r"sheet.csv is an Excel workbook .*save the sheet as CSV"),
    "old.xls": (bytes.fromhex("d0cf11e0a1b11ae1") + bytes(999), r"old.xls is an Excel workbook"),
    "rows.zip": (zipped("rows.jsonl"), r"rows.zip is a zip archive; unpack it"),
    "rows.jsonl.bz2": (bz2.compress(b'{"a": 1}\n'), r"rows.jsonl.bz2 is compressed by bzip2; unpack it"),
    "rows.jsonl.xz": (lzma.compress(b'{"a": 1}\n'), r"rows.jsonl.xz is compressed by xz; unpack it"),
    "packed.jsonl": (gzip.compress(b'{"a": 1}\n'), r"packed.jsonl is compressed by gzip; give its name the ending .gz"),
    "table.jsonl": (b"PAR1" + bytes(99), r"table.jsonl is Parquet; give its name the ending .parquet"),
    "rows.pkl": (pickle.dumps([{"a": 1}]), r"rows.pkl is a pickle, which is never opened; write it"),
    "rows.db": (b"SQLite format 3" + bytes(99), r"rows.db is an SQLite database; write its table as CSV"),
    "pointer.csv": (
        "version https://git-lfs.github.com/spec/v1\noid",
        r"pointer.csv is a pointer of Git LFS.*lfs pull",
    ),
    "page.jsonl": ("\n<!DOCTYPE html><html>", r"page.jsonl is a web page; download the file itself"),
    "noise.jsonl": (b"a\0b\n" * 3, r"noise.jsonl is not text; give a file of texts"),
    "array.json": ('[{"a": 1}, 7]', r"array.json, row 2: a JSON object is wanted, not 7; mend or remove the row"),
    "cut.json": ('[{"a": 1}, {"a"', r"cut.json: not JSON .*mend or remove the file"),
    "columns.json": (
        '{"q": {"0": "x"},\n "a": {"0": "y"}}',
        r"columns.json: one object with 'q', 'a', not rows; write an array .*orient='records'",
    ),
    "long line.csv": (
        "a,b\n1,2\n\n1,2,3\n",
        r"long line.csv, line 4: 3 fields, but the header has 2: .*'3'.*mend or remove",
    ),
    "short.csv": ("a,b\n1\n", r"short.csv, line 2: 1 fields, but the header has 2"),
    "after lines.csv": ('a,b\n"x\ny",2\n1\n', r"after lines.csv, line 4: 1 fields"),
    "by column.json": (
        '{"q": ["x", "y"], "a": ["1", "2"]}',
        r"by column.json: one object with 'q', 'a', not rows; write an array .*orient='records'",
    ),
    "by index.json": ('{"0": {"q": "x"}, "1": {"q": "y"}}', r"by index.json: one object with '0', '1', not rows"),
    "by split.json": (
        '{"train": [{"q": "x"}], "test": [{"q": "y"}]}',
        r"one object with 'train', 'test'",
    ),
    "after sep.csv": ("sep=;\na;b\n1;2\n1;2;3\n", r"after sep.csv, line 4: 3 fields, but the header has 2"),
    "header.csv": ("a,a\n1,2\n", r"header.csv, line 1: the header \['a', 'a'\] needs one name for each column"),
    "quote.csv": ('a,b\n"x,2\n', r"quote.csv, line 2: not CSV \(unexpected end of data\); mend or remove"),
    "latin.csv": ("a\né\n".encode("latin-1"), r"latin.csv, line 2: not UTF-8"),
    "torn.parquet": (b"PAR1half", r"torn.parquet is not a readable Parquet file: .*write it again"),
    "no.jsonl.gz": (b'{"a": 1}\n', r"no.jsonl.gz is not a whole .gz file: .*write it again, or remove it"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 99)[:-9], r"cut.jsonl.gz is not a whole .gz file"),
    "bad.parquet.gz": (gzip.compress(b"PAR1half"), r"bad.parquet.gz is not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        list(read_file(tmp_path / name))
    with pytest.raises(ValueError, match=words):
        build_task(TaskConfig(name="rows", options={"path": str(tmp_path / name), "prompt": "a", "answer": "a"}))


def test_empty_files_have_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):
        (tmp_path / name).write_text("")
        assert list(read_file(tmp_path / name)) == []
