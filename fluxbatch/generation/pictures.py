"""Decodes and prepares the pictures of batches ahead of the devices, in threads and in bounded memory."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from fluxbatch.distributed.process_group import ProcessGroup
from fluxbatch.models.family import Family
from fluxbatch.storage.picture import read
from fluxbatch.types import Batch, Reject, Row

AHEAD = 2  # batches that are read while one is at work

Prepared = Mapping[str, np.ndarray]


def ahead(
    batches: Sequence[Batch], family: Family, group: ProcessGroup
) -> Generator[tuple[Batch, tuple[tuple[Row, Reject], ...]], None, None]:
    """The batches with what their rows' pictures are prepared to; each without the rows whose pictures cannot be read,
    which stand beside it."""
    if not any(batch.mode.reads_pictures for batch in batches):
        yield from ((batch, ()) for batch in batches)
        return
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1)), "picture") as pool:
        waiting: deque[tuple[Batch, list[Future[Any]]]] = deque()
        rest = iter(batches)
        try:
            while True:
                for batch in itertools.islice(rest, AHEAD + 1 - len(waiting)):
                    rows = batch.rows if batch.mode.reads_pictures else ()
                    waiting.append((batch, [pool.submit(_prepared, row, family) for row in rows]))
                if not waiting:
                    return
                batch, futures = waiting.popleft()
                yield _read(batch, [future.result() for future in futures], group) if futures else (batch, ())
        finally:
            pool.shutdown(cancel_futures=True)


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


def prepare(row: Row, family: Family) -> Prepared:
    """What the family makes of the row's pictures; ValueError says why it cannot."""
    return family.prepare(row, {field: [read(p) for p in pictures] for field, pictures in row.pictures.items()})
