"""Manifest files as numbered lines of named values: JSONL, CSV, TSV, a prompt a line.

Nothing here knows what a field means. Whatever the bytes are, a bad line becomes a ``BadLine``
with its reason, and reading goes on with the next.
"""

from __future__ import annotations

import csv
import json
import math
from collections import deque
from collections.abc import Iterator
from string import whitespace
from typing import Any, BinaryIO, NamedTuple

from fluxbatch.types import UserError

TAB = "\t"
MAX_LINE = 10_000_000  # bytes; longer lines are never held
_MAX_QUOTED_LINES = 100  # physical lines that one quoted field may span
_AROUND = "\r\n "  # means nothing before and after a line


class BadLine(ValueError):
    """Why a line is not a set of named values."""


class Line(NamedTuple):
    number: int  # counted from 1, as editors do
    fields: dict[str, Any] | BadLine


def json_lines(stream: BinaryIO) -> Iterator[Line]:
    """One JSON object a line."""
    for number, text in _text_lines(stream):
        yield Line(number, text if isinstance(text, BadLine) else _object(text))


def prompt_lines(stream: BinaryIO) -> Iterator[Line]:
    """One prompt a line."""
    for number, text in _text_lines(stream):
        yield Line(number, text if isinstance(text, BadLine) else {"prompt": text})


def table_lines(stream: BinaryIO, delimiter: str, name: str) -> tuple[list[str], Iterator[Line]]:
    """The header's column names, and the lines as column → cell. Cells left out are ``""``.

    Raises UserError when the header cannot be read; ``name`` is the file, for the message.
    """
    lines = _raw_lines(stream)
    nothing = 1, BadLine("no header line with the column names")
    number, text = next((line for line in lines if isinstance(line[1], BadLine) or line[1].strip()), nothing)
    cells = text if isinstance(text, BadLine) else _cells(text, delimiter, 0)
    if isinstance(cells, BadLine):
        raise UserError(f"{name}:{number}: {cells}")
    columns = [cell.strip() for cell in cells or []]
    doubled = sorted({c for c in columns if c and columns.count(c) > 1})
    if doubled:
        raise UserError(f"{name}:{number}: column {shown(doubled[0])} is there more than once")
    return columns, _table(lines, columns, delimiter)


def _table(lines: Iterator[tuple[int, str | BadLine]], columns: list[str], delimiter: str) -> Iterator[Line]:
    ahead: deque[tuple[int, str | BadLine]] = deque()  # read while looking for a closing quote
    while ahead or (following := next(lines, None)) is not None:
        number, text = ahead.popleft() if ahead else following
        cells = text if isinstance(text, BadLine) else _cells(text, delimiter, len(columns))
        if cells is None:
            cells = _quoted_cells(text, len(columns), delimiter, lines, ahead)
        if isinstance(cells, list) and len(cells) > len(columns):
            cells = BadLine(f"{len(cells)} cells, but the header names {len(columns)} columns")
        if isinstance(cells, BadLine):
            yield Line(number, cells)
        elif any(cell.strip() for cell in cells):
            cells += [""] * (len(columns) - len(cells))
            yield Line(number, {c: cell for c, cell in zip(columns, cells) if c})


def _quoted_cells(
    text: str, columns: int, delimiter: str, lines: Iterator[tuple[int, str | BadLine]], ahead: deque[tuple[int, str | BadLine]]
) -> list[str] | BadLine | None:
    """Cells of a record whose quoted field goes on over the following lines.

    A quote that is never closed costs only its own line: what was read ahead stays to be read. In TSV
    it is a character then, and also where the record that it would make has not one cell a column, or
    each of its lines has so many by itself.
    """
    plain = lambda line: _cells(line, TAB, columns, csv.QUOTE_NONE)  # noqa: E731
    complete = lambda line: isinstance(cells := plain(line), list) and len(cells) == columns > 1  # noqa: E731
    first, alone = text, complete(text)
    for count in range(_MAX_QUOTED_LINES):
        if count == len(ahead):
            following = next(lines, None)
            if following is None:
                break
            ahead.append(following)
        line = ahead[count][1]
        if isinstance(line, BadLine):
            break
        text = f"{text}\n{line}"
        alone = alone and complete(line)
        if '"' not in line or (cells := _cells(text, delimiter, columns)) is None:
            continue
        if delimiter == TAB and (alone or isinstance(cells, BadLine) or len(cells) != columns):
            break
        if isinstance(cells, list):
            for _ in range(count + 1):
                ahead.popleft()
        return cells
    if delimiter == TAB:
        return plain(first)
    return BadLine("a quote is opened and never closed")


def _cells(text: str, delimiter: str, columns: int, quoting: int = csv.QUOTE_MINIMAL) -> list[str] | BadLine | None:
    """The cells of one record, or None while a quote is still open.

    Blank ones at the end count only up to ``columns``: spreadsheets write a table's empty cells too.
    """
    text = text.strip(_AROUND)
    try:
        cells = next(csv.reader([text], delimiter=delimiter, strict=True, quoting=quoting))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return None
        if delimiter == TAB and "expected after" in str(error) and "\n" not in text:
            return _cells(text, TAB, columns, csv.QUOTE_NONE)
        return BadLine(f"not {'TSV' if delimiter == TAB else 'CSV'}: {error}")
    while len(cells) > columns and not cells[-1].strip():
        cells.pop()
    return cells


def _object(text: str) -> dict[str, Any] | BadLine:
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:  # half of a surrogate pair cannot be written as UTF-8 again
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return BadLine(f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeEncodeError:
        return BadLine("half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    except BadLine as error:
        return error
    except ValueError:
        return BadLine("a number has too many digits")
    except RecursionError:
        return BadLine("nested too deeply")
    if not isinstance(value, dict):
        return BadLine(f'got {described(value)}, expected an object like {{"prompt": "a red apple"}}')
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadLine(f"{shown(next(k for k in keys if keys.count(k) > 1))} is given more than once")
    return fields


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise BadLine(f"{digits[:40]} is too large for a number")
    return value


def _no_constant(name: str) -> Any:
    raise BadLine(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_constant)


def _text_lines(stream: BinaryIO) -> Iterator[tuple[int, str | BadLine]]:
    """(number, text) of the lines that are not blank, without what stands around them."""
    for number, text in _raw_lines(stream):
        if isinstance(text, BadLine):
            yield number, text
        elif text.strip(whitespace):
            yield number, text.strip(_AROUND)


def _raw_lines(stream: BinaryIO) -> Iterator[tuple[int, str | BadLine]]:
    """(number, text) of every line, without its end."""
    number = 0
    while data := stream.readline(MAX_LINE + 1):
        number += 1
        if len(data) > MAX_LINE and not data.endswith(b"\n"):
            while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield number, BadLine(f"longer than {MAX_LINE // 1_000_000} MB")
            continue
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")  # editors on Windows begin files so
        try:
            text = data.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            utf_16 = number == 1 and data.startswith((b"\xff\xfe", b"\xfe\xff"))
            hint = "; is the file UTF-16? Save it as UTF-8" if utf_16 else ""
            yield number, BadLine(f"not UTF-8: byte 0x{data[error.start]:02x} at column {error.start + 1}{hint}")
            continue
        yield number, BadLine("contains a NUL byte") if "\0" in text else text


def described(value: Any) -> str:
    """A JSON value as messages show it: short, on one line, with its type."""
    if value is None:
        return "null"
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    kinds = {str: "string", bool: "boolean", int: "number", float: "number"}
    return f"{shown(value)} ({kinds[type(value)]})"


def shown(value: Any) -> str:
    """A JSON value, short and on one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
