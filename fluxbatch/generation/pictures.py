"""Decodes and prepares the pictures of batches ahead of the devices, in threads and in bounded memory."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from fluxbatch.distributed.process_group import ProcessGroup
from fluxbatch.models.family import Family
from fluxbatch.storage.picture import read
from fluxbatch.types import Batch, Reject, Row

AHEAD = 2  # batches that are read while one is at work

Prepared = Mapping[str, np.ndarray]


class Reader:
    """The batches of a shard, with what their rows' pictures are prepared to, each without the rows whose pictures
    cannot be read, which stand beside it. It begins to read at once, while the shard's text is encoded; to be closed.
    """

    def __init__(self, batches: Sequence[Batch], family: Family, group: ProcessGroup):
        self._family, self._group, self._rest = family, group, iter(batches)
        reads = any(batch.mode.reads_pictures for batch in batches)
        threads = min(8, 2 * (os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(threads, "picture") if reads else None
        self._waiting: deque[tuple[Batch, list[Future[Any]]]] = deque()
        self._begin()

    def _begin(self) -> None:
        for batch in itertools.islice(self._rest, AHEAD + 1 - len(self._waiting)):
            futures = []
            if self._pool and batch.mode.reads_pictures:
                futures = [self._pool.submit(_prepared, row, self._family) for row in batch.rows]
            self._waiting.append((batch, futures))

    def __iter__(self) -> Iterator[tuple[Batch, tuple[tuple[Row, Reject], ...]]]:
        while self._waiting:
            self._begin()
            batch, futures = self._waiting.popleft()
            yield _read(batch, [future.result() for future in futures], self._group) if futures else (batch, ())

    def close(self) -> None:
        """Read no more."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def _read(
    batch: Batch, found: Sequence[Prepared | str], group: ProcessGroup
) -> tuple[Batch, tuple[tuple[Row, Reject], ...]]:
    # a process that cannot read a picture would stand alone in a batch of another size
    good = group.all_have([not isinstance(each, str) for each in found])
    rows, prepared, bad = [], [], []
    for row, each, readable in zip(batch.rows, found, good, strict=True):
        if readable and not isinstance(each, str):
            rows.append(row)
            prepared.append(each)
        else:
            reason = each if isinstance(each, str) else "another process of this replica could not read its pictures"
            bad.append((row, Reject(row.where, reason, row.id, row.index)))
    return dataclasses.replace(batch, rows=tuple(rows), pictures=tuple(prepared)), tuple(bad)


def _prepared(row: Row, family: Family) -> Prepared | str:
    """What the family makes of the row's pictures, or why it cannot."""
    try:
        return prepare(row, family)
    except ValueError as error:
        return str(error)


def finish(row: Row, pixels: np.ndarray, family: Family) -> np.ndarray:
    """The row's image, uint8 ``[H, W, 3]``, of what was drawn for it. ValueError if that needs a picture that cannot be
    read any more."""
    return pixels if row.padding_mask_crop is None else family.finish(row, pixels, _pictures(row))


def _pictures(row: Row) -> dict[str, list[Image.Image]]:
    return {field: [read(picture) for picture in pictures] for field, pictures in row.pictures.items()}


def prepare(row: Row, family: Family) -> Prepared:
    """What the family makes of the row's pictures; ValueError says why it cannot."""
    return family.prepare(row, _pictures(row))
