"""Fields of Parquet schemas, each with its description in the metadata."""

from __future__ import annotations

import pyarrow as pa


def field(name: str, kind: pa.DataType, doc: str, *, nullable: bool = False) -> pa.Field:
    """A column with its description."""
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


def items(kind: pa.DataType) -> pa.DataType:
    """A list whose elements are never null."""
    return pa.list_(pa.field("element", kind, nullable=False))
