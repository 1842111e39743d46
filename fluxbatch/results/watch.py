"""How far a run is, from what it writes anyway: records, signs of life, rejects."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Iterator, Mapping

import yaml

from fluxbatch.results.ledger import RECORDS, REJECTED
from fluxbatch.results.location import CONFIG, REPLICAS, STATUS
from fluxbatch.storage.base import NotFound, Store
from fluxbatch.storage.log import in_parallel

_AT_ONCE = 64  # objects of records read before the next are asked for


@dataclasses.dataclass(frozen=True)
class Replica:
    """The last sign of one replica. ``state``: running, lost, or how it ended. ``age``: of the sign, in seconds."""

    name: str
    state: str
    counts: Mapping[str, int]
    speed: float | None  # images per second, lately
    age: float


@dataclasses.dataclass(frozen=True)
class View:
    """A run at one instant. ``rows``: of the manifest; ``state``: why it ended, or that it goes on."""

    url: str
    state: str
    rows: int
    done: int
    rejected: int
    replicas: tuple[Replica, ...]
    error: str | None

    @property
    def goes_on(self) -> bool:
        return any(replica.state == "running" for replica in self.replicas)


class Watch:
    """Looks at one run, again and again: what never changes is read once."""

    def __init__(self, store: Store):
        self._store = store
        self._records: set[int] = set()  # hashes of lines, of which a compaction may leave two
        self._read: set[str] = set()
        self._signs: dict[str, tuple[bytes, float]] = {}  # name → sign, and when it came to be
        self._error: tuple[str, str] | None = None

    def look(self) -> View:
        try:
            status = json.loads(self._store.read(STATUS))
        except NotFound:  # several replicas write it when they have rows to make
            status = {"exit_code": None, "counts": {}}
        try:
            expiry = float(yaml.safe_load(self._store.read(CONFIG))["replica_expiry"])
        except (NotFound, KeyError, TypeError):
            expiry = 120.0
        signs = [self._sign(name, expiry) for name in self._store.list(REPLICAS)]
        counts, ended = status["counts"], status["exit_code"] is not None
        if not signs:
            signs = [self._sign(STATUS, expiry)]
        elif ended:  # by the replica that merged; others may have begun anew since
            signs = [sign for sign in signs if sign.state == "running"]
        rows = counts.get("rows", sum(counts.get(key, 0) for key in ("made", "before", "rejected", "left")))
        if ended and not any(sign.state == "running" for sign in signs):
            done, rejected, state = counts["made"] + counts["before"], counts["rejected"], status["reason"]
        else:
            done, rejected = self._count(), sum(sign.counts.get("rejected", 0) for sign in signs)
            state = "running" if any(sign.state == "running" for sign in signs) else "nobody is at work"
        return View(self._store.url, state, rows, done, rejected, tuple(signs), self._last_error())

    def _sign(self, name: str, expiry: float) -> Replica:
        data = self._store.read(name)
        now, sign = time.monotonic(), json.loads(data)
        if self._signs.get(name, (b"", 0.0))[0] != data:
            # one that came while we look is alive, whatever its clock says
            self._signs[name] = data, now if name in self._signs else -expiry
        written = datetime.datetime.fromisoformat(sign["time"])
        age = max(0.0, (datetime.datetime.now(datetime.UTC) - written).total_seconds())
        state = "running"
        if (code := sign.get("exit_code")) is not None:
            state = f"ended with {code}"
        elif age > expiry and now - self._signs[name][1] > expiry:
            state = "lost"
        speed = sign.get("speed", {}).get("images_per_second")
        number = name.removeprefix(REPLICAS).removesuffix(".json") if name != STATUS else "0"
        return Replica(number, state, sign.get("counts", {}), speed if state == "running" else None, age)

    def _count(self) -> int:
        """Records, each once: also those that a killed replica had no time to tell of."""
        while new := [name for name in self._store.list(RECORDS) if name not in self._read]:
            vanished = False
            for start in range(0, len(new), _AT_ONCE):
                for data in in_parallel(self._bytes, new[start : start + _AT_ONCE]):
                    self._records.update(map(hash, data.splitlines()))
                    vanished |= not data
            self._read.update(new)
            if not vanished:  # else what was compacted is in an object that another listing shows
                break
        return len(self._records)

    def _last_error(self) -> str | None:
        new = [name for name in self._store.list(REJECTED) if name not in self._read]
        last = {name.rpartition("-")[0]: name for name in new}  # of each writer
        for data in in_parallel(self._bytes, last.values()):
            for line in map(json.loads, data.splitlines()):
                found = line["created"], f"{line['where']}: {line['reason']}"
                self._error = max(self._error or found, found)
        self._read.update(new)
        return self._error and self._error[1]

    def _bytes(self, name: str) -> bytes:
        try:
            return self._store.read(name)
        except NotFound:  # compacted meanwhile
            return b""


def lines(view: View) -> Iterator[str]:
    """The view as a table."""
    speed = sum(replica.speed or 0.0 for replica in view.replicas)
    left = max(0, view.rows - view.done - view.rejected)
    share = f" ({view.done / view.rows:.1%})" if view.rows else ""
    rate = f", {speed:.3g} images/s" if speed else ""
    eta = f", {datetime.timedelta(seconds=round(left / speed))} to go" if speed and left else ""
    yield f"{view.url}: {view.state}"
    whole = f" of {view.rows:,}" if view.rows else ""
    yield f"  {view.done:,}{whole} rows done{share}, {view.rejected:,} rejected{rate}{eta}"
    if len(view.replicas) > 1 or view.goes_on or any(replica.state == "lost" for replica in view.replicas):
        yield f"  {'replica':8} {'state':16} {'made':>10} {'rejected':>9} {'images/s':>9}  last sign"
        for replica in sorted(view.replicas, key=lambda each: (len(each.name), each.name)):
            made, rejected = (f"{replica.counts.get(key, 0):,}" for key in ("made", "rejected"))
            rate = f"{replica.speed:.3g}" if replica.speed else "-"
            age = datetime.timedelta(seconds=round(replica.age))
            yield f"  {replica.name:8} {replica.state:16} {made:>10} {rejected:>9} {rate:>9}  {age} ago"
    if view.error and view.rejected:
        yield f"  last error  {' '.join(view.error.split())[:160]}"
