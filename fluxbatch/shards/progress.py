"""How far a replica has come: at once on the terminal, now and then in its status."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

from tqdm import tqdm

from fluxbatch.types import Row

EVERY = 30.0  # seconds from one report in the status to the next
# A line at each step, at the least so many seconds after the last one, and each minute
MINUTE, STEP, LEAST = 60.0, 0.05, 5.0
Report = Callable[[Mapping[str, int], Mapping[str, float]], None]  # counts, and the speed since the last time


class Progress:
    """The rows of this replica as they are recorded. ``before``: rows that were done when it started. ``rows``: those
    that it will make; None where others make some of them, nobody knows which. ``report``: called by the thread that
    records."""

    def __init__(self, before: int, rows: int | None, report: Report):
        self.made = self.rejected = 0
        self.rows = rows
        self._before, self._report = before, report
        self._beside: dict[int, int] = {}
        self._since: float | None = None
        self._lately = 0  # rows since then
        self._reported = False  # of the first batch

    @property
    def counts(self) -> dict[str, int]:
        counts = {"made": self.made, "before": self._before, "rejected": self.rejected}
        return counts if self.rows is None else counts | {"left": self.rows - self.made - self.rejected}

    def beside(self, row: Row, count: int) -> None:
        """``row`` is the last one of a batch here, and so many of it are recorded by other processes; they count when
        it is, as made."""
        self._beside[row.index] = count

    def through(self, row: Row, ok: bool) -> int:
        """A row is recorded, with its image or without; returns how many are with it."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._since >= EVERY:  # before the row counts, so that it is whole batches in whole spans
            self._report(self.counts, {"images_per_second": float(f"{self._lately / (now - self._since):.4g}")})
            self._since, self._lately = now, 0
        last, others = row.index in self._beside, self._beside.pop(row.index, 0)
        self.made += others + ok
        self.rejected += not ok
        self._lately += others + 1
        if last and not self._reported:  # the first batch
            self._reported = True
            self._report(self.counts, {})
        return others + 1


class Lines:
    """Instead of a bar, where standard error is no terminal: plain lines, a few of them."""

    def __init__(self, total: int | None, what: str, unit: str, unit_scale: bool = False):
        self._total, self.desc, self._unit, self._scale = total, what, unit, unit_scale
        self._count = self._printed = 0
        self._begun = self._at = self._worked_at = time.monotonic()
        self._worked = 0.0  # seconds, without the time that ``unpause`` leaves out
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._each_minute, name="lines", daemon=True)

    def update(self, count: int = 1) -> None:
        with self._lock:
            now = time.monotonic()
            self._worked, self._worked_at = self._worked + now - self._worked_at, now
            self._count += count
            total = self._total
            goes_on = total is not None and self._count < total and self._count - self._printed >= STEP * total
            if goes_on and now - self._at >= LEAST:
                self._print()

    def set_description_str(self, what: str) -> None:
        """What the next lines say is going on."""
        self.desc = what

    def unpause(self) -> None:
        """The time since the last update was not its own."""
        with self._lock:
            self._worked_at = time.monotonic()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._print()

    def _each_minute(self) -> None:
        while not self._over.wait(max(0.1, MINUTE - (time.monotonic() - self._at))):
            with self._lock:
                if time.monotonic() - self._at >= MINUTE:
                    self._print()

    def _print(self) -> None:
        with self._lock:
            self._at, self._printed = time.monotonic(), self._count
            rate = self._count / self._worked if self._worked else None
            line = tqdm.format_meter(
                self._count, cast(float, self._total), self._at - self._begun,  # tqdm takes None too
                ncols=0, prefix=self.desc, unit=self._unit,
                unit_scale=self._scale, rate=rate)  # fmt: skip
            print(line.strip(), file=sys.stderr, flush=True)


def bar(total: int | None, what: str, unit: str, quiet: bool = False, unit_scale: bool = False) -> tqdm[Any] | Lines:
    """A context manager that counts what is done, and shows it on standard error."""
    if quiet or sys.stderr.isatty():
        return tqdm(
            total=total, desc=what, unit=unit, unit_scale=unit_scale, dynamic_ncols=True, leave=True, smoothing=0.1,
            disable=quiet)  # fmt: skip
    return Lines(total, what, unit, unit_scale)
