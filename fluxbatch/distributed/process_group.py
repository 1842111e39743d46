"""This process and its peers: the processes that share one copy of the model are a replica and run the
same program on the same batches; each keeps the images of its own devices.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from fluxbatch.distributed.peers import ALONE
from fluxbatch.types import Exit, Row, UserError

LOST = "another process of this replica was lost: run the same command again"
_FAILED = 2**32 - 256  # from here on: what a process that fails sends, with its exit code


class KnownToAll(UserError):
    """A failure that every process of the replica has learned of."""


class ProcessGroup:
    """All communication between the processes of a replica; a plain answer when there is one process.

    Every process makes the same calls in the same order. In a run that is:

    1. ``together`` around all that opens it. Within: ``all_say`` as memory is divided, ``start_id``,
       ``first_goes_first`` around the ledger, ``agree`` on configuration and manifest, ``as_first_sees`` on what is
       left to do, ``agree`` on file names, ``all_say`` on the text cache.
    2. For each shard: ``least`` and ``first_has`` where replicas claim shards, ``all_have`` of the text cache,
       ``whole`` of each batch of prompts. Before each batch ``shutdown.Drain`` synchronizes.
    3. ``meet`` once all is recorded, ``first_says`` for the exit code.
    """

    @property
    def count(self) -> int:
        """Processes of the replica."""
        return jax.process_count()

    @property
    def index(self) -> int:
        """This process's number in its replica."""
        return jax.process_index()

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for its replica."""
        return jax.process_index() == 0

    def start_id(self) -> str:
        """An id of this start, the same in all processes of the replica."""
        self.meet()  # whoever has failed so far
        word = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        return bytes(self.first_has(np.frombuffer(word.encode(), np.uint8))).decode()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A process that fails in the body ends all: the others raise KnownToAll where they next meet it, at
        the body's end if not before. Nobody waits for one that is gone."""
        try:
            yield
        except KnownToAll:
            raise
        except BaseException as error:
            if self.is_loss(error):
                self.lost(error)
            self._exchange(_FAILED + (error.code if isinstance(error, UserError) else 1))
            raise
        self.meet()

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process runs the body before the others do."""
        if not self.is_first:
            self.meet()
        yield
        if self.is_first:
            self.meet()

    def meet(self) -> None:
        """Waits until every process of the replica is here."""
        self._exchange(0)

    def agree(self, what: str, values: Iterable[object]) -> None:
        """UserError unless every process has the same ``values``."""
        whole = hashlib.sha256()
        for value in values if self.count > 1 else ():
            whole.update(repr(value).encode("utf-8", "surrogatepass"))
        words = self._exchange(int.from_bytes(whole.digest()[:4]) % _FAILED)
        if odd := [i for i, other in enumerate(words) if other != words[0]]:
            line = f"process {odd[0]} of this replica sees another {what} than process 0"
            own = f"processes with a job of their own each are started with {ALONE} set"
            raise KnownToAll(f"{line}: the same files and settings are needed; {own}")

    def as_first_sees(self, todo: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
        """The first process's ``todo``, on all of them: other replicas may record rows between one look and the
        next. ``rows``: all there are, equal everywhere. UserError where a process knows less than the first."""
        if self.count == 1:
            return list(todo)
        own = {row.id for row in todo}
        is_todo = self.first_has(np.array([row.id in own for row in rows], np.uint8))
        first = [row for row, is_todo in zip(rows, is_todo, strict=True) if is_todo]
        self.agree("ledger", [own <= {row.id for row in first}])
        return first

    def first_says(self, number: int) -> int:
        """The first process's number, on all of them."""
        return int(self.first_has(np.array(number, np.int32)))

    def first_has(self, array: np.ndarray) -> np.ndarray:
        """The first process's array, on all of them; shape and dtype are equal everywhere."""
        return np.asarray(multihost_utils.broadcast_one_to_all(array)) if self.count > 1 else array

    def least(self, number: int) -> int:
        """The least of all processes' numbers."""
        return int(np.min(multihost_utils.process_allgather(np.int32(number)))) if self.count > 1 else number

    def all_say(self, yes: bool) -> bool:
        """Whether every process says yes."""
        return all(self._exchange(int(yes)))

    def all_have(self, has: Sequence[bool]) -> list[bool]:
        """Of several things, those that every process has."""
        if self.count == 1:
            return list(has)
        return np.all(multihost_utils.process_allgather(np.array(has, np.uint8)), axis=0).tolist()

    def whole(self, array: jax.Array) -> np.ndarray:
        """All of a global array, on every host."""
        if array.is_fully_addressable:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    def own(self, rows: Sequence[Row], *arrays: jax.Array) -> tuple[Sequence[Row], list[Any]]:
        """The rows of a batch whose images lie on this host's devices, and their part of the arrays,
        which NumPy copies back when it is asked to. Of images that several devices hold, the host of the
        first copy has them."""
        if arrays[0].is_fully_addressable:
            return rows, list(arrays)
        starts = sorted(_starts(arrays[0]))
        size = next(iter(arrays[0].addressable_shards)).data.shape[0]
        chosen = [i for at in starts for i in range(at, at + size)]
        # What fills the batch up comes last in it, so a host's padding comes last in its part.
        return [rows[i] for i in chosen if i < len(rows)], [_Own(array) for array in arrays]

    def lost(self, error: BaseException) -> NoReturn:
        """Ends this process because a peer is gone."""
        print(f"fluxbatch: {LOST}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        os._exit(Exit.PEER_LOST)

    def leave(self, code: int) -> None:
        """Ends this process if it has peers, which a regular exit would wait for while they wait for it."""
        if self.count > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def is_loss(self, error: BaseException) -> bool:
        """Whether ``error`` says that a peer is gone, and not that this process's own device is full."""
        of_jax = isinstance(error, jax.errors.JaxRuntimeError)
        return self.count > 1 and of_jax and "RESOURCE_EXHAUSTED" not in str(error)

    def _exchange(self, value: int) -> list[int]:
        """Every process's value. One that fails meets the others wherever they are, as all meet by this one program."""
        if self.count == 1:
            return [value]
        values = np.asarray(multihost_utils.process_allgather(np.array([value], np.uint32))).reshape(-1).tolist()
        if value < _FAILED <= max(values):
            who = next(i for i, other in enumerate(values) if other >= _FAILED)
            known = KnownToAll(f"process {who} of this replica has failed, and says why")
            known.code = values[who] - _FAILED
            raise known
        return values


def _starts(array: jax.Array) -> dict[int, jax.Array]:
    """This host's parts of a global array by their first row."""
    return {shard.index[0].start or 0: shard.data for shard in array.addressable_shards if shard.replica_id == 0}


class _Own:
    """This host's rows of a global array, in order."""

    def __init__(self, array: jax.Array):
        self._shards = _starts(array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rows = np.concatenate([np.asarray(self._shards[at]) for at in sorted(self._shards)])
        return rows if dtype is None else rows.astype(dtype)
