"""Which rows run together: pure functions, so that every host of a replica gets the same answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fluxbatch.types import Batch, Row, Shard


def plan(rows: Iterable[Row], batch_size: int, shard_size: int) -> list[Shard]:
    """Rows → batches of one compiled shape → shards of about ``shard_size`` rows.

    Rows are bucketed by size; within a bucket rows with like step counts stand together (a batch
    takes as many steps as its longest row), else in manifest order. Only the last batch of a
    bucket is short.
    """
    buckets: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        buckets.setdefault((row.height, row.width), []).append(row)
    batches = []
    for bucket in buckets.values():
        bucket.sort(key=lambda row: (row.num_inference_steps, row.index))
        batches += [Batch(tuple(bucket[i : i + batch_size]), batch_size) for i in range(0, len(bucket), batch_size)]
    per_shard = max(1, shard_size // batch_size)
    return [Shard(n, tuple(batches[i : i + per_shard])) for n, i in enumerate(range(0, len(batches), per_shard))]


def padded(rows: Sequence[Row], size: int) -> list[Row]:
    """``rows`` filled up to ``size`` with the last one; what fills never reaches disk."""
    return [*rows, *[rows[-1]] * (size - len(rows))]
