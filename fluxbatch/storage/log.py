"""JSON lines in a store that many processes append to without asking each other.

An object is written once, whole, under a name that no other process uses. To compact is to write
one larger object and only then to delete the smaller ones, so at any instant every line is there
at least once; readers must take a doubled line for one.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fluxbatch.storage.base import NotFound, StorageError, Store, join

_PARALLEL = 16  # objects read at once: on object storage each one waits for the network
_AT_ONCE = 32 << 20  # bytes of large ones that are read at once

A = TypeVar("A")
B = TypeVar("B")


class Log:
    """The objects under ``prefix``, each line with the keys ``needs``. ``writer_id``: another one for every start of
    every process."""

    def __init__(self, store: Store, prefix: str, writer_id: str, needs: Set[str] = frozenset()):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", writer_id):
            raise ValueError(f"writer_id: got {writer_id!r}, expected letters, digits, - and _")
        self._store = store
        self._prefix = prefix
        self._writer_id = writer_id
        self._needs = needs
        self._lock = threading.Lock()
        self._count = 0

    def append(self, lines: Iterable[bytes]) -> str:
        """Writes one object and returns its name. It is durable then."""
        with self._lock:
            self._count += 1
            name = f"{self._prefix}{self._writer_id}-{self._count:06d}.jsonl"
        if not self._store.write(name, b"".join(lines), if_absent=True):
            raise StorageError(f"{join(self._store.url, name)}: two processes have one writer id", fatal=True)
        return name

    def scan(self, writer: str = "") -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        """(object, line, value of the line) of everything that is there now, or of those whose id begins with
        ``writer``; read piece by piece."""
        read: set[str] = set()
        # An object that vanishes meanwhile, or while the first listing goes on, was compacted into one that the next
        # listing shows. Not every new one is waited for: many replicas append faster than a bucket lists.
        for listing in itertools.count():
            names = [name for name in self.names(writer) if name not in read]
            read.update(names)
            vanished, count, left = False, 2, deque(names)
            while left:
                window = [left.popleft() for _ in range(min(count, len(left)))]
                found = deque(zip(window, in_parallel(self._read, window), strict=True))
                largest = max(len(data or b"") for _, data in found)
                count = max(2, min(_PARALLEL, _AT_ONCE // max(1, largest)))
                while found:  # what is through is not held
                    name, data = found.popleft()
                    vanished |= data is None
                    yield from self._lines(name, data)
                    del data
            if not names or (listing and not vanished):
                return

    def names(self, writer: str = "") -> list[str]:
        return list(self._store.list(self._prefix + writer))

    def delete(self, names: Iterable[str]) -> None:
        self._store.delete(*names)

    def drop(self, unwanted: Callable[[dict[str, Any]], bool], objects: Set[str]) -> None:
        """Removes lines from ``objects``: what has some is written again without them, and then deleted."""
        lines: dict[str, list[tuple[bytes, bool]]] = {}
        for name, line, value in self.scan():
            if name in objects:
                lines.setdefault(name, []).append((line, unwanted(value)))
        for name, found in lines.items():
            kept = [line for line, goes in found if not goes]
            if len(kept) < len(found):
                if kept:
                    self.append(kept)
                self.delete([name])

    def _read(self, name: str) -> bytes | None:
        """None: it is gone."""
        try:
            return self._store.read(name)
        except NotFound:
            return None

    def _lines(self, name: str, data: bytes | None) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        place = join(self._store.url, name)
        if data == b"":  # nobody appends nothing
            raise StorageError(f"{place}: empty; is the disk damaged?", fatal=True)
        for number, line in enumerate((data or b"").splitlines(), 1):
            line += b"\n"  # an editor may have saved the last one without its end
            yield name, line, object_of(line, f"{place}:{number}", self._needs)


def object_of(line: bytes, place: str, needs: Set[str]) -> dict[str, Any]:
    """The JSON object of a line that has the keys ``needs``; a fatal StorageError for anything else."""
    try:
        value = json.loads(line)
    except ValueError:
        raise StorageError(f"{place}: not a line of JSON; is the disk damaged?", fatal=True) from None
    if isinstance(value, dict) and needs <= value.keys():
        return value
    missing = f"without {', '.join(sorted(needs - value.keys()))}" if isinstance(value, dict) else "no JSON object"
    raise StorageError(f"{place}: {missing}, expected what a run has written there", fatal=True)


def in_parallel(function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """``function`` of every item, in order; the first error is raised when all have ended."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(_PARALLEL, len(items))) as pool:
        return list(pool.map(function, items))


def json_line(value: Any) -> bytes:
    """One line of JSON, in UTF-8 as people write it."""
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
