"""Which rows run together, and where: pure functions, so that all who ask get the same answer."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence

from fluxbatch.types import Batch, Mode, Row, Shard


def plan(rows: Iterable[Row], batch_size: int, shard_size: int) -> list[Shard]:
    """Rows → batches of one compiled shape → shards of about ``shard_size`` rows.

    Rows are bucketed by size and mode; within a bucket rows with like step counts stand together (a batch
    takes as many steps as its longest row), else in manifest order. Only the last batch of a
    bucket is short.
    """
    whole = [batch for bucket in _buckets(rows) for batch in batches(bucket, batch_size)]
    per_shard = max(1, shard_size // batch_size)
    return [Shard(n, tuple(whole[i : i + per_shard])) for n, i in enumerate(range(0, len(whole), per_shard))]


def batches(rows: Sequence[Row], batch_size: int) -> list[Batch]:
    """Rows of one size, in their order, as batches."""
    return [Batch(tuple(rows[i : i + batch_size]), batch_size) for i in range(0, len(rows), batch_size)]


def padded(rows: Sequence[Row], size: int) -> list[Row]:
    """``rows`` filled up to ``size`` with the last one; what fills never reaches disk."""
    return [*rows, *[rows[-1]] * (size - len(rows))]


def work_units(rows: Sequence[Row], batch_size: int, shard_size: int) -> list[tuple[Row, ...]]:
    """A whole manifest as what one replica claims at a time: rows of one size, whole batches but for the last.

    Half of each bucket lies in work units of the full size, half of the rest in work units of half that size, and
    so on down to a batch: the large ones keep claims few, the small ones make any number of replicas end
    together. The answer does not depend on that number, nor on which rows are done.
    """
    full = min(shard_size, max(1, len(rows) // 256))
    cut = []
    for bucket in _buckets(rows):
        at = 0
        while at < len(bucket):
            size = full >> int(math.log2(len(bucket) / (len(bucket) - at)))
            size = max(1, size // batch_size) * batch_size
            cut.append(tuple(bucket[at : at + size]))
            at += size
    return cut


def assign_units(costs: Sequence[float], count: int) -> list[list[int]]:
    """Work units for ``count`` replicas, by number, in the order of work; all replicas' cost about the same.

    The costly ones go out first, neighbours together, so that a replica compiles few image sizes; each class of
    half the cost then fills up what is still uneven. Work units that cost nothing (all done) are nobody's.
    """
    loads: list[float] = [0.0] * count
    assigned: list[list[int]] = [[] for _ in range(count)]
    spent = 0.0
    scale = {n: math.frexp(cost)[1] for n, cost in enumerate(costs) if cost}
    for _, alike in itertools.groupby(sorted(scale, key=lambda n: -scale[n]), key=scale.__getitem__):
        members = list(alike)
        total = math.fsum(costs[n] for n in members)
        spent += total
        room = list(itertools.accumulate(max(0.0, spent / count - load) for load in loads))
        before = 0.0
        for n in members:
            replica = min(bisect.bisect_left(room, (before + costs[n] / 2) / total * room[-1]), count - 1)
            before += costs[n]
            loads[replica] += costs[n]
            assigned[replica].append(n)
    return assigned


def cost(row: Row) -> float:
    """About how long a row takes a device, in TFLOP of a 12B transformer: what tells rows apart, not a time."""
    image, text = row.height * row.width / 256, row.mode.text_tokens or 512  # tokens
    tokens = image + text
    step = 0.0129 * tokens + 7e-7 * tokens**2  # linear layers, attention
    passes = 2 if row.mode.negative else 1
    return passes * row.steps * step + 0.0025 * image + 5  # decoding, encoding the text


def _buckets(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by image size and mode, in the order of first appearance; in each, like step counts together."""
    buckets: dict[tuple[int, int, Mode], list[Row]] = {}
    for row in rows:
        buckets.setdefault((row.height, row.width, row.mode), []).append(row)
    for bucket in buckets.values():
        bucket.sort(key=lambda row: (row.steps, row.index))
    return list(buckets.values())
