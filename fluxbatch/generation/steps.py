"""A batch's schedules as arrays: rows with other step counts share one program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STEPS = 8  # of a schedule that are prepared and run at a time


def padded_sigmas(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Schedules of a batch as data: levels ``[B, S + 1]``, zero after each row's end, and step counts
    ``[B]``. S is a multiple of ``STEPS``: programs take that many, so that another count compiles nothing."""
    counts = np.array([len(row) - 1 for row in rows], np.int32)
    size = -(-counts.max() // STEPS) * STEPS
    levels = np.zeros((len(rows), size + 1), np.float32)
    for level, row in zip(levels, rows, strict=True):
        level[: len(row)] = row
    return levels, counts
