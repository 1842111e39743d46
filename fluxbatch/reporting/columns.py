"""What readers that give each column of metadata.jsonl one type make of the manifest's own fields.

They are carried as they are, so all that is done about it is a word at the start: Hugging Face's `datasets` refuses a
column of two types, reads whole numbers of more than 2**63 - 1 as float64, and takes types from the first 10 MB.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fluxbatch.manifest.formats import shown
from fluxbatch.types import Row

LARGEST = 2**63 - 1
_FIRST = 8e6  # bytes of the file that surely are among the first 10 MB
_RECORD = 1_000  # bytes of a record, about, without its texts
_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d(:?\d\d(:?\d\d)?)?Z?)?")
# Kind → what it is to JSON, and the kinds that a column may be of already to take it as it is
_KINDS = {
    "text": ("text", {"text"}),
    "date": ("text", {"text", "date"}),
    "whole": ("number", {"whole", "float"}),
    "float": ("number", {"float"}),
    "bool": ("true or false", {"bool"}),
    "list": ("list", {"list"}),
    "object": ("object", {"object"}),
}


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """A remark on each way in which fields of ``rows`` do not fit columns."""
    found: dict[str, dict[str, str]] = {}  # path → kind → where it is first
    early: dict[str, set[str]] = {}  # path → its kinds in the first part of the file
    late: dict[str, str] = {}  # field → where it first has what the first part does not tell of
    large: Counter[str] = Counter()
    size = 0
    for row in rows:
        size += _RECORD + len(row.prompt.encode("utf-8", "replace")) + len(row.prompt_2.encode("utf-8", "replace"))
        large["seed"] += row.seed > LARGEST
        if not row.extra:
            continue
        size += len(str(row.extra))
        for field, value in row.extra.items():
            huge = False
            for path, kind, of in _values(field, value):
                huge |= kind == "whole" and not -LARGEST - 1 <= of <= LARGEST
                found.setdefault(path, {}).setdefault(kind, row.where)
                if size < _FIRST:
                    early.setdefault(path, set()).add(kind)
                elif not early.get(path, set()) & _KINDS[kind][1]:
                    late.setdefault(field, row.where)
            large[field] += huge
    mixed = {}
    for path, kinds in found.items():
        of = {_KINDS[kind][0]: where for kind, where in reversed(kinds.items())}
        if len(of) > 1:
            mixed[path] = ", ".join(f"{kind} at {where.rpartition('/')[2]}" for kind, where in reversed(of.items()))
    if mixed:
        said = "; ".join(f"{shown(path)[1:-1]} ({of})" for path, of in mixed.items())
        yield f"fields of more than one type, which `datasets` refuses to load: {said}"
    if late := {field: where for field, where in late.items() if not any(_is_of(path, field) for path in mixed)}:
        said = ", ".join(f"{shown(field)[1:-1]} ({where.rpartition('/')[2]})" for field, where in late.items())
        yield (
            "fields that `datasets` loses or refuses, as it takes types from the first 10 MB of metadata.jsonl "
            f"and these have another later: {said}"
        )
    if large := +large:
        said = ", ".join(f"{shown(field)[1:-1]} ({count:,} rows)" for field, count in large.items())
        exact = "; seed_text has every digit of a seed" if large["seed"] else ""
        yield (
            "whole numbers of more than 2**63 - 1, which `datasets` rounds to float64, with their whole column, "
            f"or refuses beside a run without: {said}{exact}"
        )


def _values(path: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    """Each value within, with its path and its kind; null has none."""
    if isinstance(value, dict):
        yield path, "object", value
        for key, each in value.items():
            yield from _values(f"{path}.{key}", each)
    elif isinstance(value, list):
        yield path, "list", value
        for each in value:
            yield from _values(f"{path}[]", each)
    elif isinstance(value, bool):
        yield path, "bool", value
    elif isinstance(value, str):
        yield path, "date" if _DATE.fullmatch(value) else "text", value
    elif value is not None:
        yield path, "whole" if isinstance(value, int) else "float", value


def _is_of(path: str, field: str) -> bool:
    return path == field or path.startswith((f"{field}.", f"{field}[]"))
