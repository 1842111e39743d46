"""Parquet files as numbered lines of named values, a row group at a time."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

from fluxbatch.manifest.files import pyarrow
from fluxbatch.manifest.formats import Line
from fluxbatch.types import UserError

_ROWS = 1000  # made Python's at once
_BUFFER = 1 << 20  # bytes of a column read at once


def parquet_rows(stream: BinaryIO, name: str) -> tuple[list[str], Iterator[Line]]:
    """The column names, and the rows with typed cells, counted from 1. ``name``: the file.

    Columns of bytes are left out, since no record could hold them. Raises UserError where the file cannot be read.
    """
    arrow = pyarrow(name)
    try:
        file = arrow.parquet.ParquetFile(stream, buffer_size=_BUFFER)
    except (arrow.ArrowException, OSError) as error:
        raise _broken(name, error) from None
    columns = [field.name for field in file.schema_arrow if not _has_bytes(arrow.types, field.type)]
    doubled = sorted({column for column in columns if columns.count(column) > 1})
    if doubled:
        raise UserError(f"{name}: column {doubled[0]!r} is there more than once")

    def lines() -> Iterator[Line]:
        number = 0
        try:
            for batch in file.iter_batches(_ROWS, columns=columns):
                for fields in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield Line(number, {column: _plain(value) for column, value in fields.items()})
        except (arrow.ArrowException, OSError) as error:
            raise _broken(name, error) from None

    return columns, lines()


def _has_bytes(types: Any, kind: Any) -> bool:
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    inner = [kind.field(i).type for i in range(kind.num_fields)] if kind.num_fields else []
    return any(_has_bytes(types, each) for each in inner)


def _plain(value: Any) -> Any:
    """A cell as JSON has it. A missing number (NaN, as pandas writes it) is null."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):  # of a struct's fields, which all rows have
        return {str(key): plain for key, each in value.items() if (plain := _plain(each)) is not None}
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, str | int | None) else str(value)


def _broken(name: str, error: Exception) -> UserError:
    return UserError(f"{name}: cannot be read as Parquet: {str(error).splitlines()[0]}")
