"""How far a replica has come: for the bar at once, for its status now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from fluxbatch.types import Row

EVERY = 30.0  # seconds at least from one word in the status to the next
Tell = Callable[[Mapping[str, int], Mapping[str, float]], None]  # counts, and the speed since the last time


class Progress:
    """The rows of this replica as they are recorded. ``before``: rows that were done when it started. ``rows``: those
    that it will make; None where others make some of them, nobody knows which. ``tell``: called by the thread that records."""

    def __init__(self, before: int, rows: int | None, tell: Tell):
        self.made = self.rejected = 0
        self.rows = rows
        self._before, self._tell = before, tell
        self._beside: dict[int, int] = {}
        self._since: float | None = None
        self._lately = 0  # rows since then

    @property
    def counts(self) -> dict[str, int]:
        counts = {"made": self.made, "before": self._before, "rejected": self.rejected}
        return counts if self.rows is None else counts | {"left": self.rows - self.made - self.rejected}

    def beside(self, row: Row, count: int) -> None:
        """So many rows of the same batch are recorded by other processes; they count when ``row`` is, as made."""
        self._beside[row.index] = count

    def through(self, row: Row, ok: bool) -> int:
        """A row is recorded, with its image or without; returns how many are with it."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._since >= EVERY:  # before the row counts, so that it is whole batches in whole spans
            self._tell(self.counts, {"images_per_second": float(f"{self._lately / (now - self._since):.4g}")})
            self._since, self._lately = now, 0
        others = self._beside.pop(row.index, 0)
        self.made += others + ok
        self.rejected += not ok
        self._lately += others + 1
        return others + 1
