"""Where a run's images lie: each in a file of its own, or many in one shard. A record's ``file_name`` finds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, Protocol

from fluxbatch.results.location import IMAGES, SHEET
from fluxbatch.storage.base import Store

Record = dict[str, Any]


class Images(Protocol):
    """Images by the ``file_name`` of their records. Every method raises StorageError and is safe in threads.

    ``together``: batches that may wait to be written together; 0: each image is written by itself.
    """

    together: int

    def read(self, name: str) -> bytes:
        """The image's file. ``NotFound`` when it is not there."""

    def write(self, name: str, data: bytes) -> None:
        """Put it there, durably, if images are written by themselves."""

    def write_together(self, images: Mapping[str, bytes]) -> None:
        """Put them there, durably, if they are not."""

    def missing(self, names: Set[str]) -> set[str]:
        """Those of ``names`` that are not there, or are empty."""

    def list(self) -> Iterator[str]:
        """Names of all images that are there, recorded or not."""

    def release(self, names: Iterable[str]) -> None:
        """Make images deletable one by one. To be called before their records are dropped."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove released images, once no record speaks of them."""

    def recover(self) -> None:
        """Undo what a kill left half done. Only where nobody else is at work."""

    def expect(self, extras: Iterable[Mapping[str, Any]]) -> None:
        """Hear of the manifest's own fields in every row, which decide a column's type."""

    def located(self, record: Mapping[str, Any]) -> Record:
        """The record with what says where its image lies, as of the last look."""


class Files:
    """Each image a file of its own."""

    together = 0

    def __init__(self, store: Store):
        self._store = store
        self.read = store.read
        self.missing = store.missing

    def write(self, name: str, data: bytes) -> None:
        self._store.write(name, data)

    def write_together(self, images: Mapping[str, bytes]) -> None:
        """Nothing: they are written."""

    def list(self) -> Iterator[str]:
        return (name for name in self._store.list() if name.endswith(IMAGES) and name != SHEET)

    def release(self, names: Iterable[str]) -> None:
        """Nothing: they are."""

    def delete(self, names: Iterable[str]) -> None:
        self._store.delete(*names)

    def recover(self) -> None:
        """Nothing: a file is whole or not there."""

    def expect(self, extras: Iterable[Mapping[str, Any]]) -> None:
        """Nothing: no columns."""

    def located(self, record: Mapping[str, Any]) -> Record:
        return dict(record)
