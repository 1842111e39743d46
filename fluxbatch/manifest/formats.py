"""Manifest files as numbered lines of named values: JSONL, CSV, TSV, a prompt a line.

Nothing here knows what a field means. Whatever the bytes are, a bad line becomes a ``BadLine``
with its reason, and reading goes on with the next.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from string import whitespace
from typing import Any, BinaryIO, NamedTuple

from fluxbatch.types import UserError

TAB = "\t"
MAX_LINE = 10_000_000  # longer lines, and cells of a table, are never held
_SEPARATORS = (",", ";", TAB, "|")
_BOM = "\ufeff"

# How files begin that are no text, or not the text that was meant.
_KINDS = {
    rb"\x1f\x8b\x08": "compressed with gzip; unpack it (gunzip)",
    rb"BZh\d1AY&SY": "compressed with bzip2; unpack it (bunzip2)",
    rb"\xfd7zXZ\0": "compressed with xz; unpack it (unxz)",
    rb"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it (unzstd)",
    rb"PK\x03\x04": "a zip archive or a spreadsheet (.xlsx, .ods); unpack it, or save it as CSV",
    rb"\xd0\xcf\x11\xe0": "an old spreadsheet (.xls); save it as CSV",
    rb"PAR1": "a Parquet file; let its name end in .parquet",
    rb"ARROW1": "an Arrow file; write it as JSONL",
    rb"SQLite format 3\0": "a SQLite database; write it as JSONL or CSV",
    rb"\x93NUMPY": "a NumPy array; write it as JSONL",
    rb"%PDF-": "a PDF; save its text",
    rb"\{\\rtf": "rich text (RTF); save it as plain text",
    rb"\x89PNG|\xff\xd8\xff": "a picture",
    rb"version https://git-lfs": "a pointer of Git LFS, and not the file itself; fetch that (git lfs pull)",
    rb"(?i)<!doctype html|<html": "a web page (HTML), perhaps of a download that needs a login",
    rb"<\?xml": "XML; write it as JSONL or CSV",
}
_LETTERS = 4  # of UTF-16 or UTF-32, by which it is known without a mark


class BadLine(ValueError):
    """Why a line is not a set of named values."""


class Line(NamedTuple):
    number: int  # counted from 1, as editors do
    fields: dict[str, Any] | BadLine


_Raw = tuple[int, str | BadLine]  # a line's number and text
_Record = tuple[int, list[str] | BadLine]


def kind(stream: io.BufferedReader) -> str | None:
    """What the file is, as far as its first bytes tell, if it is no text in UTF-8 or another than was meant."""
    head = stream.peek(512)[:512]
    start = head.removeprefix(_BOM.encode()).lstrip()
    if (head.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0" in head) or _is_wide(head):
        return "UTF-16 or UTF-32; save it as UTF-8"
    return next((what for beginning, what in _KINDS.items() if re.match(beginning, start)), None)


def _is_wide(head: bytes) -> bool:
    """Whether every other byte, nearly, is the NUL of a Latin letter's two or four bytes."""
    halves = [half for half in (head[::2], head[1::2]) if len(half) >= _LETTERS]
    return any(half.count(0) > 0.8 * len(half) for half in halves)


def json_lines(stream: BinaryIO) -> Iterator[Line]:
    """One JSON object a line."""
    for number, text in _text_lines(stream):
        yield Line(number, text if isinstance(text, BadLine) else _object(text))


def prompt_lines(stream: BinaryIO) -> Iterator[Line]:
    """One prompt a line."""
    for number, text in _text_lines(stream):
        yield Line(number, text if isinstance(text, BadLine) else {"prompt": text})


def table_lines(
    stream: BinaryIO, delimiter: str, name: str, wanted: Callable[[list[str]], bool]
) -> tuple[list[str], Iterator[Line]]:
    """The header's column names, and the lines as column → cell. Cells left out are ``""``.

    Where ``delimiter`` makes no ``wanted`` columns of the header and another usual one does, or a first line
    ``sep=;`` says so, that one is taken. Raises UserError when the header cannot be read; ``name`` is the file.
    """
    csv.field_size_limit(MAX_LINE)
    lines, ahead = _raw_lines(stream), deque[_Raw]()
    filled = (line for line in lines if isinstance(line[1], BadLine) or line[1].strip())
    number, text = next(filled, (1, BadLine("no header line with the column names")))
    if isinstance(text, str) and (said := re.fullmatch(r'"?sep=(.)"?\s*', text, re.IGNORECASE)):
        delimiter = said[1]
        number, text = next(filled, (number, BadLine("no header line with the column names")))
    if isinstance(text, str):
        as_read = {each: _names(next(csv.reader([text], delimiter=each))) for each in (delimiter, *_SEPARATORS)}
        delimiter = next((each for each, names in as_read.items() if wanted(names)), delimiter)
    ahead.append((number, text))
    _, cells = _record(lines, ahead, delimiter, 0) or (number, [])
    if isinstance(cells, BadLine):
        raise UserError(f"{name}:{number}: {cells}")
    columns = _names(cells)
    doubled = sorted({c for c in columns if c and columns.count(c) > 1})
    if doubled:
        raise UserError(f"{name}:{number}: column {shown(doubled[0])} is there more than once")
    return columns, _table(lines, ahead, columns, delimiter)


def _names(cells: list[str]) -> list[str]:
    return [cell.strip() for cell in cells]


def _table(lines: Iterator[_Raw], ahead: deque[_Raw], columns: list[str], delimiter: str) -> Iterator[Line]:
    while record := _record(lines, ahead, delimiter, len(columns)):
        number, cells = record
        if isinstance(cells, list) and len(cells) > len(columns):
            cells = BadLine(f"{len(cells)} cells, but the header names {len(columns)} columns")
        if isinstance(cells, list) and _names(cells) == columns:
            cells = BadLine("the header once more; are these two files in one?")
        if isinstance(cells, BadLine):
            yield Line(number, cells)
        elif any(cell.strip() for cell in cells):
            cells += [""] * (len(columns) - len(cells))
            yield Line(number, {c: cell for c, cell in zip(columns, cells, strict=False) if c})


def _record(lines: Iterator[_Raw], ahead: deque[_Raw], delimiter: str, columns: int) -> _Record | None:
    """The next record as the csv module reads it, with the number of its first line.

    ``ahead``: lines that were read already. A quote that is never closed costs only its own line: what was
    read while looking for its end stays to be read. In TSV, where many write without quoting, it is a
    character on a line that is a record by itself, unless that and the following make one together.
    """
    taken: list[_Raw] = []

    def asked_for() -> Iterator[str]:
        while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
            taken.append(line)
            if isinstance(line[1], BadLine):
                return
            text = line[1] if len(taken) > 1 else line[1].lstrip(" ")
            bare = text.rstrip(" ")
            yield (bare if bare.endswith('"') else text) + "\n"  # blanks after a closing quote are not strict CSV

    cells: list[str] | BadLine | None
    try:
        cells = next(csv.reader(asked_for(), delimiter=delimiter, strict=True), None)
    except csv.Error as error:
        cells = _explained(str(error), delimiter)
    if not taken:
        return None
    number, first = taken[0]
    if isinstance(first, BadLine) or cells is None:
        return number, first if isinstance(first, BadLine) else []
    if isinstance(cells, list) and cells and isinstance(last := taken[-1][1], str) and last.endswith(" "):
        cells[-1] = cells[-1].rstrip(" ")
    if delimiter == TAB and '"' in first and _is_plain(taken, cells, columns):
        cells = _plain(first, columns)
    elif isinstance(cells, list):
        taken = taken[:1]
    ahead.extendleft(reversed(taken[1:]))
    return number, cells if isinstance(cells, BadLine) else _trimmed(cells, columns)


def _is_plain(taken: list[_Raw], cells: list[str] | BadLine, columns: int) -> bool:
    """Whether the quotes of a TSV's line are characters. ``taken``: the lines of the record that they would make."""
    if isinstance(cells, BadLine) and "longer" in str(cells):
        return False
    if len(taken) == 1:
        return isinstance(cells, BadLine)
    whole = [isinstance(line, str) and len(_plain(line, columns)) == columns for _, line in taken]
    return whole[0] and (isinstance(cells, BadLine) or len(cells) != columns or (columns > 1 and all(whole)))


def _plain(line: str, columns: int) -> list[str]:
    return _trimmed(next(csv.reader([line.strip(" ")], delimiter=TAB, quoting=csv.QUOTE_NONE), []), columns)


def _trimmed(cells: list[str], columns: int) -> list[str]:
    """Without the blank ones beyond ``columns``: spreadsheets write a table's empty cells too."""
    while len(cells) > columns and not cells[-1].strip():
        cells.pop()
    return cells


def _explained(error: str, delimiter: str) -> BadLine:
    if "unexpected end of data" in error:
        return BadLine("a quote is opened and never closed")
    if "field limit" in error:
        return BadLine(f"a cell is longer than {MAX_LINE // 1_000_000} MB, or a quote is never closed")
    return BadLine(f"not {'TSV' if delimiter == TAB else 'CSV'}: {error}")


def json_array(stream: BinaryIO, name: str) -> Iterator[Line]:
    """The objects of one array, each with the number of the line that it begins on. ``name``: the file.

    Raises UserError where the array itself is broken: what follows cannot be told apart any more.
    """
    try:
        text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x}") from None
    number, counted, position = 1, 0, _past_blanks(text, 0)
    if text[position : position + 1] != "[":
        raise UserError(f"{name}: expected an array of objects; an object a line is called .jsonl")
    wanted: str | None = "]"  # an array may be empty
    position = _past_blanks(text, position + 1)
    while text[position : position + 1] != wanted:
        number, counted = number + text.count("\n", counted, position), position
        try:
            _, end = _PLAIN_DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at, what = getattr(error, "pos", position), getattr(error, "msg", "cannot be read")
            line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
            raise UserError(f"{name}:{line}: not JSON: {what} at column {column}") from None
        yield Line(number, _object(text[position:end]))
        position = _past_blanks(text, end)
        if text[position : position + 1] == ",":
            position, wanted = _past_blanks(text, position + 1), None
        elif text[position : position + 1] == "]":
            wanted = "]"
        else:
            line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
            raise UserError(f"{name}:{line}: not JSON: expected a comma or the array's end at column {column}")
    if rest := text[position + 1 :].strip(whitespace):
        raise UserError(f"{name}: {shown(rest[:20])} after the array's end")


def _past_blanks(text: str, position: int) -> int:
    blanks = _BLANKS.match(text, position)
    return blanks.end() if blanks else position


def _object(text: str) -> dict[str, Any] | BadLine:
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:  # half of a surrogate pair cannot be written as UTF-8 again
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        over_lines = text.strip() in ("[", "{", "[{")
        hint = "; an object a line is expected (an array of objects is called .json)" if over_lines else ""
        return BadLine(f"not JSON: {error.msg} at column {error.colno}{hint}")
    except UnicodeEncodeError:
        return BadLine("half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    except BadLine as error:
        return error
    except ValueError:
        return BadLine("a number has too many digits")
    except RecursionError:
        return BadLine("nested too deeply")
    if not isinstance(value, dict):
        array = "; of an array, jq -c '.[]' makes them" if isinstance(value, list) else ""
        return BadLine(f'got {described(value)}, expected an object like {{"prompt": "a red apple"}}{array}')
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


_PLAIN_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)  # to find where a value ends
_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_constant)


def _text_lines(stream: BinaryIO) -> Iterator[_Raw]:
    """(number, text) of the lines that are not blank, without what stands around them."""
    for number, text in _raw_lines(stream):
        if isinstance(text, BadLine):
            yield number, text
        elif text.strip(whitespace):
            yield number, text.strip(" ")


def _raw_lines(stream: BinaryIO) -> Iterator[_Raw]:
    """(number, text) of every line, without its end: LF, CR LF, or CR."""
    decoded = io.TextIOWrapper(stream, "utf-8", errors="surrogateescape")
    number = 0
    try:
        while text := decoded.readline(MAX_LINE + 1):
            number += 1
            if len(text) > MAX_LINE and not text.endswith("\n"):
                while (rest := decoded.readline(1 << 20)) and not rest.endswith("\n"):
                    pass
                yield number, BadLine(f"longer than {MAX_LINE // 1_000_000} MB")
                continue
            text = text.removesuffix("\n").removeprefix(_BOM)  # editors on Windows begin files so, which may be joined
            if not text.isascii() and (bad := re.search("[\udc80-\udcff]", text)):
                byte, column = ord(bad[0]) & 0xFF, len(text[: bad.start()].encode()) + 1
                hint = "is it Latin-1 or Windows-1252? Save the file as UTF-8"
                yield number, BadLine(f"not UTF-8: byte 0x{byte:02x} at column {column}; {hint}")
            else:
                yield number, BadLine("contains a NUL byte") if "\0" in text else text
    finally:
        if not stream.closed:  # by its owner, where reading ends early
            decoded.detach()  # it would complain of the stream that it does not close


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
