"""The shards of this replica, one after another: all there are, or those it claims among several replicas.

    manifest ─ work_units ─ assigned by cost ─ claimed ─ shard ─ … ─ done ─ all done: one replica merges

A replica first claims what it was assigned. Then it takes what others have not begun, and what a lost one
left behind. The assignment is a preference: every work unit is made in the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from fluxbatch.config.schema import Job
from fluxbatch.distributed.peers import refuse_unknown_peers
from fluxbatch.distributed.process_group import ProcessGroup
from fluxbatch.distributed.replica import Replica, counted_by, find
from fluxbatch.distributed.shutdown import Drain
from fluxbatch.results.ledger import Ledger, utc_now, write_status
from fluxbatch.results.location import REPLICAS
from fluxbatch.shards import batching, progress
from fluxbatch.shards.claims import Claims, Heartbeat, Holder
from fluxbatch.shards.progress import Progress
from fluxbatch.storage.base import StorageError, Store
from fluxbatch.types import Exit, Row, Shard, UserError

_END, _WAIT, _FAILED = -1, -2, -3
_MERGE = "merge"  # the last task
_PAUSE = 0.25  # seconds until the first look for work that others may leave


def running() -> str:
    """The reason in the status of a run that goes on, or of one that was killed and could not say so."""
    return f"running, or killed after {utc_now().partition('.')[0]} UTC"


def replica(job: Job) -> Replica:
    """Which replica of how many this is; UserError when that is unclear, or not for several."""
    own = find(job.replica_index, job.replica_count)
    if job.replica_count is None and own.count == 1:
        refuse_unknown_peers()
    if job.overwrite and own.count > 1:
        by = f"replica_count={own.count}{f' ({counted_by()})' if job.replica_count is None else ''}"
        why = "as several would remove each other's images; replica_count=1 where this one has a run_name of its own"
        raise UserError(f"overwrite=true, {by}: expected one replica, {why}")
    return own


def open_work(
    job: Job,
    group: ProcessGroup,
    replica: Replica,
    store: Store,
    ledger: Ledger,
    start: str,
    rows: Sequence[Row],
    todo: Sequence[Row],
    batch_size: int,
) -> Work:
    """``rows``: the whole manifest; ``todo``: what had no record at the start. ``start``: how the writer ids of
    this replica's processes begin."""
    if replica.count == 1:
        return LocalShards(group, store, batching.plan(todo, batch_size, job.shard_size), before=len(rows) - len(todo))
    work_units = batching.work_units(rows, batch_size, job.shard_size)
    return ClaimedShards(group, replica, store, ledger, start, work_units, todo, batch_size, job.replica_expiry)


class Work(Protocol):
    alone: bool  # whether there is no other replica
    merges: bool  # whether this replica merges the records in the end
    progress: Progress

    def shards(self, drain: Drain) -> Iterator[Shard]:
        """To be asked for the next one when the records of the one before are on their way."""

    def ends_with(self, shard: Shard) -> bool:
        """Whether no other is known to follow."""

    def started(self) -> None:
        """To be called by the first process, before it asks for shards: leaves the first status."""

    def ended(self, code: int, reason: str, counts: Mapping[str, int], **more: Mapping[str, float]) -> None:
        """Leaves the status, last of all. ``counts``: of the whole run, where this replica merges; ``more``: of this
        replica."""


class LocalShards:
    """The work of the only replica. A thread renews the status, whatever the devices do."""

    alone = merges = True

    def __init__(self, group: ProcessGroup, store: Store, shards: Sequence[Shard], before: int):
        self._group, self._store, self._shards = group, store, shards
        self._speed: Mapping[str, float] = {}
        self._news, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        rows = sum(len(batch.rows) for shard in shards for batch in shard.batches)
        self.progress = Progress(before, rows, self._report)

    def shards(self, drain: Drain) -> Iterator[Shard]:
        return iter(self._shards)

    def ends_with(self, shard: Shard) -> bool:
        return shard is self._shards[-1]

    def started(self) -> None:
        write_status(self._store, None, running(), self.progress.counts)
        self._thread.start()

    def _report(self, counts: Mapping[str, int], speed: Mapping[str, float]) -> None:
        self._speed = speed
        self._news.set()

    def _beat(self) -> None:
        while True:
            self._news.wait(progress.EVERY)
            self._news.clear()
            if self._over:
                return
            with contextlib.suppress(StorageError):  # what matters will be tried again, and say so
                speed = {"speed": self._speed} if self._speed else {}
                write_status(self._store, None, running(), self.progress.counts, **speed)

    def ended(self, code: int, reason: str, counts: Mapping[str, int], **more: Mapping[str, float]) -> None:
        self._over = True
        self._news.set()
        if self._thread.is_alive():
            self._thread.join()
        write_status(self._store, code, reason, counts, **more)


class ClaimedShards:
    """The work of one replica among several. The first process claims; the others follow it.

    ``expiry``: seconds of silence after which another replica is taken for lost.
    """

    alone = False

    def __init__(
        self,
        group: ProcessGroup,
        replica: Replica,
        store: Store,
        ledger: Ledger,
        start: str,
        work_units: Sequence[Sequence[Row]],
        todo: Sequence[Row],
        batch_size: int,
        expiry: float,
    ):
        self._group, self.merges = group, False
        rows = sum(map(len, work_units))
        self.progress, self._lacking = Progress(rows - len(todo), None, self._report), len(todo)
        self._speed: Mapping[str, float] = {}
        self._replica, self._store, self._ledger = replica, store, ledger
        self._batch_size, self._patience = batch_size, expiry / 4
        lacking = {row.id for row in todo}
        self._left = [[row for row in work_unit if row.id in lacking] for work_unit in work_units]
        self._costs = [sum(map(batching.cost, left)) for left in self._left]
        if self._group.is_first:
            holder = Holder(replica.index, start)
            plan = _digest(work_units, ledger.key)
            self._heartbeat = Heartbeat(store, holder, expiry, plan, self._state)
            self._claims = Claims(store, plan, holder, expiry)
            self._queue = batching.assign_units(self._costs, replica.count)[replica.index]
            self._assigned = True  # whether the queue is this replica's own
        self._given: list[int] = []  # every work unit that was claimed, in order
        self._reported = 0  # of how many of them was written that they are done
        self._error: StorageError | None = None

    def ends_with(self, shard: Shard) -> bool:
        return False  # another replica may be lost

    def started(self) -> None:
        self._heartbeat.begin()

    def _write_first_status(self) -> None:
        """Of the run, with the first rows to make: who has none would write over the status of who merged them."""
        counts = {"before": self.progress.counts["before"], "left": self._lacking}
        with contextlib.suppress(StorageError):
            reason = f"{running()}: how far each replica is, and when it said so, is in {REPLICAS}"
            write_status(self._store, None, reason, counts)

    def _report(self, counts: Mapping[str, int], speed: Mapping[str, float]) -> None:
        self._speed = speed
        if self._group.is_first:
            self._heartbeat.renew()

    def _state(self) -> Mapping[str, object]:
        return {"reason": running(), "counts": self.progress.counts, **({"speed": self._speed} if self._speed else {})}

    def ended(self, code: int, reason: str, counts: Mapping[str, int], **more: Mapping[str, float]) -> None:
        if not self._group.is_first:
            return
        if self.merges:
            write_status(self._store, code, reason, counts)
            if code in (Exit.OK, Exit.REJECTED_ROWS, Exit.PREEMPTED):  # the last: rows that are to be made again
                self._claims.finish()
        self._heartbeat.end(code, reason, {"counts": self.progress.counts, **more})

    def shards(self, drain: Drain) -> Iterator[Shard]:
        longest = max(map(len, self._left), default=0)
        pause = _PAUSE
        while True:
            recorded = self._group.least(self._ledger.compactions)
            message = np.zeros(1 + longest, np.int32)  # the work unit's number, and which of its rows are left
            if self._group.is_first:
                message[0], left = self._next(recorded)
                message[1 : 1 + len(left)] = left
            number, *left = self._group.first_has(message).tolist()
            if number == _FAILED:
                raise self._error or StorageError(f"{self._store.url}: process 0 could not claim the next shard there")
            if number == _END:
                return
            if number == _WAIT:
                time.sleep(pause)
                pause = min(2 * pause, self._patience)
                if drain.asked():
                    return
                continue
            pause = _PAUSE
            if not self._given and self._group.is_first:
                self._write_first_status()
            self._given.append(number)
            rows = [row for row, is_left in zip(self._left[number], left, strict=False) if is_left]
            yield Shard(number, tuple(batching.batches(rows, self._batch_size)))

    def _next(self, recorded: int) -> tuple[int, list[bool]]:
        """The next work unit and which of its rows are left, or why there is none. Only in the first process."""
        try:
            for number in self._given[self._reported : recorded]:
                self._claims.done(str(number))
            self._reported = max(self._reported, recorded)
            if self._heartbeat.replaced:
                again = f"another start of replica_index={self._replica.index}"
                raise StorageError(f"{self._store.url}: {again} has taken this one's place")
            if (other := self._heartbeat.conflicting) is not None:
                raise StorageError(
                    f"{self._store.url}: replica_index={other} works there at the same time with another manifest, "
                    "configuration, batch size or "
                    f"number of chips than replica_index={self._replica.index}: replicas of one run are started "
                    "alike, others have another run_name"
                )
            while True:
                if (mine := self._from_queue()) is not None:
                    return mine, [True] * len(self._left[mine])
                survey = self._claims.survey()
                if survey.finished:
                    return _END, []
                not_done = [n for n, cost in enumerate(self._costs) if cost and str(n) not in survey.done]
                self._queue = self._in_turn([n for n in not_done if str(n) not in survey.claimed])
                self._assigned = False
                if not self._queue:
                    return self._from_the_lost(not_done, survey.claimed)
        except StorageError as error:
            self._error = error
            return _FAILED, []

    def _from_queue(self) -> int | None:
        while self._queue:
            number = self._queue.pop(0)
            if self._claims.take(str(number)):
                return number
            if not self._assigned or self._claims.finished:
                self._queue.clear()  # another replica claims these too, or has: look again
        return None

    def _in_turn(self, free: list[int]) -> list[int]:
        """The costly ones first, but every replica begins at another one."""
        free.sort(key=lambda number: -self._costs[number])
        at = len(free) * self._replica.index // self._replica.count
        return free[at:] + free[:at]

    def _from_the_lost(self, not_done: Sequence[int], claimed: Mapping[str, int]) -> tuple[int, list[bool]]:
        """Everything is claimed: what a lost replica held, in the end the merging, else nothing for now."""
        for number in not_done:
            starts = self._claims.take_over(str(number), claimed[str(number)])
            if starts is None:
                continue
            unmade = {row.id for row in self._ledger.unmade(self._left[number], starts)}
            if unmade:
                return number, [row.id in unmade for row in self._left[number]]
            self._claims.done(str(number))  # it was lost between its last record and saying so
        if not_done:
            return _WAIT, []
        generation = claimed.get(_MERGE)
        if generation is None:
            self.merges = self._claims.take(_MERGE)
        else:
            self.merges = self._claims.take_over(_MERGE, generation) is not None
        return (_END if self.merges else _WAIT), []


def _digest(work_units: Sequence[Sequence[Row]], key: Callable[[Row], str]) -> str:
    """Tells one plan from another: replicas that generate other images, or divide a manifest otherwise, cannot go by
    each other's claims."""
    digest = hashlib.sha256()
    for work_unit in work_units:
        digest.update(repr([(row.id, key(row)) for row in work_unit]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
