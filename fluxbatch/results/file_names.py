"""File names of images: a template over ``{i}``, ``{thousand}``, ``{id}`` and ``{seed}``, and no name twice."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterable, Sequence

from fluxbatch.results.location import RESERVED
from fluxbatch.storage.base import MAX_BYTES, StorageError, check_name
from fluxbatch.types import Row, UserError

__all__ = ["RESERVED", "Namer"]

FIELDS = ("i", "thousand", "id", "seed")  # thousand: of i, for folders that hold no more


class Namer:
    """``template`` with ``extension`` (".png") added, unless it ends so already.

    ``encoding``: of names in the output place.
    Raises UserError when the template names anything but FIELDS, or leaves the output place.
    """

    def __init__(self, template: str, extension: str, encoding: str = "utf-8"):
        self._encoding = encoding
        self._template = template if template.endswith(extension) else template + extension
        try:
            fields = [(field, spec) for _, field, spec, _ in string.Formatter().parse(template) if field is not None]
            for field, spec in fields:
                if field not in FIELDS or "{" in (spec or ""):
                    raise ValueError(f"no field {{{field}}}")
            self._has_index = any(field == "i" for field, _ in fields)
            check_name(self._name(0, "id", 0))
            if self._name(0, "id", 0).startswith(".") or "/." in self._template:
                raise ValueError("a hidden file")
        except (ValueError, KeyError, IndexError, StorageError) as error:
            expected = "a file name with {i}, {thousand}, {id} or {seed}, like flux_{i}"
            raise UserError(f"output.filename: got {template!r} ({error}), expected {expected}") from None

    def assign(self, rows: Sequence[Row], taken: Iterable[str]) -> dict[int, str]:
        """Row index → file name. ``taken``: the names of images that are already there.

        A row whose own name is taken gets that of the lowest free index, in the order of the
        rows; so rows that are done meanwhile, under the names given here, change no other name.
        Raises UserError when a name cannot be that of a file there.
        """
        used = {_folded(name) for name in (*RESERVED, *taken)}
        names: dict[int, str] = {}
        displaced = []
        for row in sorted(rows, key=lambda row: row.index):
            name = self._name(row.index, row.id, row.seed)
            if _folded(name) in used:
                displaced.append(row)
            else:
                used.add(_folded(name))
                names[row.index] = name
        free = 0
        for row in displaced:
            attempt = 0 if not self._has_index else free
            while _folded(name := self._other(row, attempt)) in used:
                attempt += 1
            if self._has_index:
                free = attempt
            used.add(_folded(name))
            names[row.index] = name
        for row in rows:
            if fault := _fault(names[row.index], self._encoding):
                raise UserError(f"output.filename={self._template}: {row.where or row.id}: {fault}")
        return names

    def _name(self, index: int, id: str, seed: int) -> str:
        return self._template.format(i=index, thousand=index // 1000, id=id, seed=seed)

    def _other(self, row: Row, attempt: int) -> str:
        if self._has_index:
            return self._name(attempt, row.id, row.seed)
        stem, dot, extension = self._name(row.index, row.id, row.seed).rpartition(".")
        return f"{stem}_{attempt + 1}{dot}{extension}"


def _folded(name: str) -> str:
    """Equal for names that some file systems take for one: Cat and cat, é as one character and as two."""
    return unicodedata.normalize("NFC", name).casefold()


def _fault(name: str, encoding: str) -> str | None:
    """Why a file cannot have the name."""
    try:
        name.encode(encoding)
    except UnicodeEncodeError:
        return (
            f"got {name!r}, expected {encoding}, as file names are by this locale: set PYTHONUTF8=1 or a UTF-8 locale"
        )
    folder, *rest = parts = name.split("/")
    if rest and _folded(folder) in RESERVED:
        return f"got {name!r}, expected another folder, as a run writes a file of that name"
    longest = max(len(part.encode()) for part in parts)
    return f"got a name of {longest} bytes, expected at most {MAX_BYTES}" if longest > MAX_BYTES else None
