"""Lines by number, in a temporary file: a million records are more than a run should hold in memory."""

from __future__ import annotations

import itertools
import tempfile
from array import array
from collections.abc import Iterator
from typing import Self

import numpy as np

from fluxbatch.storage.base import Store

_IN_MEMORY = 16 << 20  # bytes, beyond which a file is made


class SortedLines:
    """To be used with ``with``, which removes the file."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 (closed on leaving)
        self._numbers, self._starts = array("q"), array("q", [0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, number: int, line: bytes) -> int:
        """Keeps a line, which may be asked for by what is returned. With a negative number that is all."""
        self._file.write(line)
        self._numbers.append(number)
        self._starts.append(self._starts[-1] + len(line))
        return len(self._numbers) - 1

    def line(self, place: int) -> bytes:
        """A line that was added. No more are to be added then."""
        self._file.seek(self._starts[place])
        return self._file.read(self._starts[place + 1] - self._starts[place])

    def __iter__(self) -> Iterator[bytes]:
        """The lines by number; those of one number by their bytes."""
        numbers = np.frombuffer(self._numbers, np.int64) if self._numbers else np.zeros(0, np.int64)
        order = np.argsort(numbers, kind="stable")
        for number, places in itertools.groupby(order, key=lambda place: numbers[place]):
            if number >= 0:
                yield from sorted(self.line(place) for place in places)

    def write_to(self, store: Store, name: str) -> None:
        """All lines as one object."""
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as whole:
            for line in self:  # writelines would hold them all before it makes a file
                whole.write(line)
            size = whole.tell()
            whole.seek(0)
            if size <= _IN_MEMORY:
                store.write(name, whole.read())
            else:
                store.write_file(name, whole)
