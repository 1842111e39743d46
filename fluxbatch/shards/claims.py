"""Who makes what, where several replicas share an output directory and nothing else.

    .fluxbatch/replicas/3.json          replica 3's heartbeat while it runs, its status afterwards
    .fluxbatch/claims/PLAN/17.1         task 17 is with the replica and start that stand in it …
    .fluxbatch/claims/PLAN/17.2         … and, when that one was lost, with the next
    .fluxbatch/claims/PLAN/17.done      its records are durable
    .fluxbatch/claims/PLAN/finished     so are all, and they are merged: there is nothing to claim any more

A claim is created if absent, so one replica gets it. It is good as long as its holder lives: until its
heartbeat says that it ended or was started anew, or until that has stood still for ``expiry`` seconds by the
clock of who looks, so clocks need not agree. Then the next generation is up for claiming. A holder
that is alive all the same (frozen, cut off) costs a row generated twice; it is recorded under one key and counts once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fluxbatch.results.ledger import HIDDEN, utc_now
from fluxbatch.results.location import REPLICAS
from fluxbatch.storage.base import NotFound, StorageError, Store
from fluxbatch.storage.log import in_parallel

_CLAIMS = HIDDEN + "claims/"
_FINISHED, _DONE = "finished", "done"


class Holder(NamedTuple):
    """One start of one replica."""

    replica: int
    start: str  # an id of the start


class Heartbeat:
    """A replica's heartbeat, renewed by a thread from ``begin`` to ``end``. ``plan``: as of `Claims`.
    ``state``: what each one says besides."""

    def __init__(
        self, store: Store, holder: Holder, expiry: float, plan: str, state: Callable[[], Mapping[str, object]] = dict
    ):
        self._store, self._holder, self._expiry, self._plan = store, holder, expiry, plan
        self._predecessor: str | None = None
        self._doubtful: dict[int, bytes] = {}  # signs of other plans: of replicas that were killed, unless they change
        self._state = state
        self._over, self._soon = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.replaced = False  # a later start of the same replica has replaced this one
        self.conflicting: int | None = None  # a replica that lives and works at another plan in the same directory

    def begin(self) -> None:
        self._predecessor = self._written()
        self._write(0, **self._state())
        self._doubtful = {
            n: sign
            for name in self._store.list(REPLICAS)
            if (n := _number(name)) is not None and (sign := self._of_another_plan(n))
        }
        self._thread.start()

    def end(self, exit_code: int, reason: str, more: Mapping[str, object]) -> None:
        """Leaves the replica's status; what it holds is free from now on."""
        self._over.set()
        self._soon.set()
        self._thread.join()
        if not self._is_replaced():
            self._write(None, exit_code=exit_code, reason=reason, **more)

    def renew(self) -> None:
        """There is something new to say."""
        self._soon.set()

    def _beat(self) -> None:
        for number in itertools.count(1):
            self._soon.wait(self._expiry / 4)
            self._soon.clear()
            if self._over.is_set():
                return
            try:
                self.replaced = self._is_replaced()
                if self.replaced:
                    return
                self._write(number, **self._state())
                changed = (n for n, sign in self._doubtful.items() if self._of_another_plan(n) not in (sign, None))
                self.conflicting = next(changed, None)
            except StorageError:
                pass  # the next one may get through; too many failures, and others take over

    def _is_replaced(self) -> bool:
        # the one before may be alive enough to write once more: it then finds a start that it does not know
        return self._written() not in (self._holder.start, self._predecessor, None)

    def _of_another_plan(self, replica: int) -> bytes | None:
        """The sign of a replica that works at another plan, as far as it says."""
        try:
            data = self._store.read(_sign(replica))
        except NotFound:
            return None
        sign = json.loads(data)
        return data if sign["beat"] is not None and sign["plan"] != self._plan else None

    def _written(self) -> str | None:
        try:
            return json.loads(self._store.read(_sign(self._holder.replica)))["start"]
        except NotFound:
            return None

    def _write(self, beat: int | None, **more: object) -> None:
        sign = {**self._holder._asdict(), "plan": self._plan, "beat": beat, **more, "time": utc_now()}
        self._store.write(_sign(self._holder.replica), json.dumps(sign, indent=2).encode() + b"\n")


@dataclasses.dataclass(frozen=True)
class Survey:
    """How the tasks stand; those that nobody has claimed are in neither."""

    done: frozenset[str]
    claimed: Mapping[str, int]  # the others' latest generation
    finished: bool


class Claims:
    """The claims on the tasks of one plan. ``plan``: an id that replicas with the same tasks agree on.

    ``expiry``: seconds without a new heartbeat after which a holder is taken for lost.
    """

    def __init__(
        self, store: Store, plan: str, holder: Holder, expiry: float, clock: Callable[[], float] = time.monotonic
    ):
        self._store, self._holder, self._expiry, self._clock = store, holder, expiry, clock
        # Once everything is finished, another start (for rows that were rejected) begins a claiming of its own.
        round = 0
        while store.exists(f"{_CLAIMS}{plan}-{round}/{_FINISHED}"):
            round += 1
        self._folder = f"{_CLAIMS}{plan}-{round}/"
        self._holders: dict[str, Holder] = {}  # claims never change
        self._signs: dict[int, tuple[bytes, float]] = {}  # replica → its sign, and when it was first seen
        self.finished = False  # as of the last claiming

    def take(self, task: str) -> bool:
        """Claims a task that nobody has."""
        return self._create(task, 1)

    def take_over(self, task: str, generation: int) -> list[str] | None:
        """Claims a task whose holder is lost; the starts that held it before, or None: it is not to be had."""
        try:
            before = [self._read(task, earlier) for earlier in range(1, generation + 1)]
        except NotFound:  # all was finished meanwhile
            return None
        if not self._is_lost(before[-1]) or not self._create(task, generation + 1):
            return None
        return [holder.start for holder in before]

    def done(self, task: str) -> None:
        """Says that the task's records are durable."""
        self._store.write(f"{self._folder}{task}.{_DONE}", b"")

    def finish(self) -> None:
        """Says that all is done and merged, and clears the claims away."""
        names = [name for name in self._store.list(self._folder) if not name.endswith(_FINISHED)]
        self._store.write(self._folder + _FINISHED, b"")
        in_parallel(self._store.delete, names)

    def survey(self) -> Survey:
        done: set[str] = set()
        claimed: dict[str, Any] = {}
        for name in self._store.list(self._folder):
            task, _, what = name.removeprefix(self._folder).rpartition(".")
            if what == _FINISHED:
                return Survey(frozenset(), {}, True)
            if what == _DONE:
                done.add(task)
            else:
                claimed[task] = max(int(what), claimed.get(task, 0))
        return Survey(frozenset(done), {task: n for task, n in claimed.items() if task not in done}, False)

    def _create(self, task: str, generation: int) -> bool:
        name = f"{self._folder}{task}.{generation}"
        if not self._store.write(name, json.dumps(self._holder._asdict()).encode() + b"\n", if_absent=True):
            return False
        # Who wakes up after the end finds no claims: they are deleted after it is written.
        self.finished = self._store.exists(self._folder + _FINISHED)
        if self.finished:
            self._store.delete(name)
        return not self.finished

    def _read(self, task: str, generation: int) -> Holder:
        name = f"{self._folder}{task}.{generation}"
        if name not in self._holders:
            self._holders[name] = Holder(**json.loads(self._store.read(name)))
        return self._holders[name]

    def _is_lost(self, holder: Holder) -> bool:
        if holder == self._holder:
            return False
        try:
            data = self._store.read(_sign(holder.replica))
        except NotFound:
            return True
        sign = json.loads(data)
        if sign["start"] != holder.start or sign["beat"] is None:
            return True
        now = self._clock()
        seen, since = self._signs.get(holder.replica, (None, now))
        if data != seen:
            since = now
        self._signs[holder.replica] = data, since
        return now - since > self._expiry


def _sign(replica: int) -> str:
    return f"{REPLICAS}{replica}.json"


def _number(sign: str) -> int | None:
    number = sign.removeprefix(REPLICAS).removesuffix(".json")
    return int(number) if number.isdecimal() else None
