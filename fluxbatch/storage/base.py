"""One small interface over the places that hold a run: a local directory, ``gs://bucket/prefix`` or
``s3://bucket/prefix``.

A write is durable and whole when it returns, or it did not happen. Names are relative, with ``/``
between their parts; a name that would leave the store is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set
from typing import IO, Protocol

from fluxbatch.types import UserError

MAX_BYTES = 255  # of a part of a name


class StorageError(UserError):
    """The place could not be read or written: one line that names it. Never holds credentials.

    ``fatal``: every later write will fail as well (disk full, no permission, no such bucket).
    ``unforeseen``: nobody's mistake (disk full, a server that stays away): another start may find it gone, so the exit
    code is 1.
    """

    def __init__(self, message: str, *, fatal: bool = False, unforeseen: bool = False):
        super().__init__(message)
        self.fatal = fatal
        if unforeseen:
            self.code = 1


class NotFound(StorageError):
    """The name is not in the store."""


class Store(Protocol):
    """Whole objects by name. Every method raises ``StorageError`` and is safe to call from threads."""

    url: str

    def read(self, name: str) -> bytes:
        """The object's bytes. ``NotFound`` when it is not there."""

    def size(self, name: str) -> int:
        """Its bytes. ``NotFound`` when it is not there."""

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """``size`` bytes from ``start`` on, fewer where the object ends. ``NotFound`` when it is not there."""

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Put the object there, durably and at once. False: ``if_absent`` and the name was taken."""

    def write_file(self, name: str, file: IO[bytes]) -> None:
        """The same with the bytes of an open file, from its start, which memory need not hold."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Names that begin with ``prefix``, sorted."""

    def missing(self, names: Set[str]) -> set[str]:
        """Those of ``names`` that are not there, or are empty: cheap for a million."""

    def delete(self, *names: str) -> None:
        """Remove the objects, in any order; one that is not there is fine."""

    def exists(self, name: str) -> bool: ...

    def sweep(self) -> None:
        """Remove what killed writers left half done (never anything under a real name)."""

    def hold(self, name: str, *, shared: bool) -> contextlib.AbstractContextManager[None]:
        """Keep other starts out of the place until the context ends, or this process does; those that share it
        let each other in. ``StorageError`` when another has it. Does nothing where there are no locks."""


class Bucket(Store, Protocol):
    """A store of objects."""

    def versions(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """Names that begin with ``prefix``, sorted, with what tells the object from any other of its name."""


def join(url: str, *names: str) -> str:
    """``url/name/…`` for local paths and addresses alike."""
    return "/".join([url.rstrip("/"), *names]) if names else url


def check_name(name: str) -> None:
    """Refuses a name that could mean a place outside the store."""
    parts = name.split("/")
    bad = any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > MAX_BYTES for part in parts)
    if bad or "\\" in name or any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise StorageError(f"{name!r}: not a name inside the output place", fatal=True)
