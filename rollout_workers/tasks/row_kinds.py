"""Kinds of files that are no rows, known by their first bytes: what people bring beside JSON, CSV and Parquet."""

from __future__ import annotations

import codecs

HEAD = 512
"""Bytes that are looked at."""
_SHEET = "save the sheet as CSV UTF-8 (.csv)"
_UNPACK = "unpack it first (.gz alone is read as it is)"
_KINDS = {
    b"\xd0\xcf\x11\xe0": ("an Excel workbook (.xls) or another Office file", _SHEET),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", _UNPACK),
    b"BZh": ("compressed by bzip2", _UNPACK),
    b"\xfd7zXZ": ("compressed by xz", _UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"\x1f\x8b": ("compressed by gzip", "give its name the ending .gz"),
    b"PAR1": ("Parquet", "give its name the ending .parquet"),
    b"ARROW1": ("an Arrow file", "name the folder that datasets' save_to_disk wrote, or write Parquet"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "name the folder that datasets' save_to_disk wrote, or write Parquet"),
    b"SQLite format 3": ("an SQLite database", "write its table as CSV"),
    b"\x89HDF": ("HDF5", "write it as Parquet or CSV"),
    b"%PDF": ("a PDF", "write its rows as CSV or JSON lines"),
    b"\x80": ("a pickle, which is never opened", "write it as Parquet or JSON lines"),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "fetch the file (git lfs pull)"),
}
_TEXTS = {
    b"<!doctype html": ("a web page", "download the file itself (its raw or resolve address)"),
    b"<html": ("a web page", "download the file itself (its raw or resolve address)"),
    b"<?xml": ("XML", "write its rows as CSV or JSON lines"),
}
"""No rows, but texts."""
_WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def foreign_kind(head: bytes, *, rows: bool) -> str | None:
    """What a file is instead of texts, or of ``rows``, by its first ``HEAD`` bytes, and what to do: ``is UTF-16 or
    UTF-32, not UTF-8; save the file as UTF-8``; ``None`` where it may be read."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    for first, (kind, remedy) in _KINDS.items():
        if head.startswith(first):
            return f"is {kind}; {remedy}"
    for first, (kind, remedy) in _TEXTS.items():
        if rows and start.startswith(first):
            return f"is {kind}; {remedy}"
    if head.startswith(b"PK\x03\x04"):
        excel = b"[Content_Types].xml" in head or b"xl/" in head
        return (
            f"is an Excel workbook (.xlsx) or another Office file; {_SHEET}"
            if excel
            else f"is a zip archive; {_UNPACK}"
        )
    if head.startswith(_WIDE) or len(head) // 3 < head.count(0) <= len(head) * 3 // 4:
        return "is UTF-16 or UTF-32, not UTF-8; save the file as UTF-8 (in Excel: CSV UTF-8)"
    return f"is not text; give a file of texts, not this one: {head[:20]!r}" if 0 in head else None
