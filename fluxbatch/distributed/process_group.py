"""This process and its peers: the processes that share one copy of the model are a replica and run the
same program on the same batches; each keeps the images of its own devices.

Everything here is a plain answer when there is one process.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from fluxbatch.distributed import join
from fluxbatch.distributed.peers import ALONE
from fluxbatch.types import Exit, Row, UserError

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
REMOTE = {"gs": "gcsfs", "s3": "s3fs"}  # through what JAX writes its cache where
XLA_TUNING = "xla_gpu_per_fusion_autotune_cache_dir"  # XLA's own cache within JAX's
GPU_SHARES = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # JAX's names for it; it refuses to be told both
HEARTBEAT, SHUTDOWN = 30, 15  # seconds until a silent peer counts as lost, and that an exit waits for peers


def tell_compiler(xla: Sequence[str], libtpu: Sequence[str]) -> None:
    """Adds flags to XLA_FLAGS and LIBTPU_INIT_ARGS, and the share of a GPU, before JAX starts; what is there already wins."""
    for variable, flags in (("XLA_FLAGS", xla), ("LIBTPU_INIT_ARGS", libtpu)):
        given = os.environ.get(variable, "").split()
        names = {flag.partition("=")[0] for flag in given}
        if added := [flag for flag in flags if flag.partition("=")[0] not in names]:
            os.environ[variable] = " ".join([*added, *given])
    if not any(map(os.environ.get, GPU_SHARES)):
        os.environ[GPU_SHARES[0]] = str(gpu_share())


def gpu_share() -> float:
    """The part of a GPU's memory that JAX takes: 0.9, unless the environment says another. Of its own accord it takes 0.75,
    which is less of 40 GB than a 12B transformer and its text encoders need when the next shard's texts are encoded."""
    return float(next(filter(None, map(os.environ.get, GPU_SHARES)), 0.9))


def start(platform: str, cache_dir: str | None, writable: bool = True) -> str:
    """Brings JAX up on ``platform`` (``auto``: the best there is) and returns its name: cpu, gpu or tpu.
    ``writable``: whether compiled programs may be added to ``cache_dir``.

    UserError when this machine does not have it, or JAX cannot write to ``cache_dir`` from here.
    """
    scheme, remote, _ = (cache_dir or "").partition("://")
    if remote and not (scheme in REMOTE and importlib.util.find_spec(REMOTE[scheme])):
        raise UserError(f"jax_cache_dir={cache_dir}: expected a local directory, null, or gs://bucket/prefix where gcsfs is installed")
    asked, instead = f"hardware={platform}", ""
    if platform != "auto":
        jax.config.update("jax_platforms", PLATFORMS[platform])
    elif told := next((name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(name)), None):
        asked, instead = f"{told}={os.environ[told]}", f"; expected a platform of this machine, or {told} unset for the best there is"
    if cache_dir:
        jax.config.update("jax_compilation_cache_dir", cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2 if writable else 1e9)
    join.join(HEARTBEAT, SHUTDOWN)
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # of a missing cuda jax 0.10 has nothing to say but that
        reason = next(iter(str(error).splitlines()), "no such device is visible")
        raise UserError(f"{asked}: JAX finds none here: {reason}{instead}") from error
    if platform not in ("auto", found):
        raise UserError(f"{asked}: this process already runs on {found}")
    if found == "gpu" and cache_dir and not remote:
        tuning = os.path.join(cache_dir, XLA_TUNING)
        if not (writable and (os.access(tuning, os.W_OK) or not os.path.exists(tuning))):
            # a write that fails would end XLA's compiling
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    return found


def start_id() -> str:
    """Another word for every start, the same in all processes of the replica."""
    meet()  # whoever has failed so far
    word = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
    return bytes(first_has(np.frombuffer(word.encode(), np.uint8))).decode()


def index() -> int:
    """This process's number in its replica."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process speaks for its replica."""
    return jax.process_index() == 0


class KnownToAll(UserError):
    """A failure that every process of the replica has learned of."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A process that fails in the body ends all: the others raise KnownToAll where they next meet it, at
    the body's end if not before. Nobody waits for one that is gone."""
    try:
        yield
    except KnownToAll:
        raise
    except BaseException as error:
        if is_loss(error):
            lost(error)
        _exchange(_FAILED + (error.code if isinstance(error, UserError) else 1))
        raise
    meet()


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process runs the body before the others do."""
    if not is_first():
        meet()
    yield
    if is_first():
        meet()


def meet() -> None:
    """Waits until every process of the replica is here."""
    _exchange(0)


def agree(what: str, values: Iterable[object]) -> None:
    """UserError unless every process has the same ``values``."""
    whole = hashlib.sha256()
    for value in values if jax.process_count() > 1 else ():
        whole.update(repr(value).encode("utf-8", "surrogatepass"))
    words = _exchange(int.from_bytes(whole.digest()[:4]) % _FAILED)
    if odd := [i for i, other in enumerate(words) if other != words[0]]:
        line = f"process {odd[0]} of this replica sees another {what} than process 0: the same files and settings are needed"
        raise KnownToAll(f"{line}; processes with a job of their own each are started with {ALONE} set")


_FAILED = 2**32 - 256  # from here on: the word of a process that fails, with its exit code


def _exchange(word: int) -> list[int]:
    """Every process's word. One that fails meets the others wherever they are, as all meet by this one program."""
    if jax.process_count() == 1:
        return [word]
    words = np.asarray(multihost_utils.process_allgather(np.array([word], np.uint32))).reshape(-1).tolist()
    if word < _FAILED <= max(words):
        who = next(i for i, other in enumerate(words) if other >= _FAILED)
        known = KnownToAll(f"process {who} of this replica has failed, and says why")
        known.code = words[who] - _FAILED
        raise known
    return words


LOST = "another process of this replica was lost: run the same command again"


def is_loss(error: BaseException) -> bool:
    """Whether ``error`` says that a peer is gone, and not that this process's own device is full."""
    return jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)


def lost(error: BaseException) -> NoReturn:
    """Ends this process because a peer is gone."""
    print(f"fluxbatch: {LOST}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
    os._exit(Exit.PEER_LOST)


def leave(code: int) -> None:
    """Ends this process if it has peers, which a regular exit would wait for while they wait for it."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def first_says(number: int) -> int:
    """The first process's number, on all of them."""
    return int(first_has(np.array(number, np.int32)))


def first_has(array: np.ndarray) -> np.ndarray:
    """The first process's array, on all of them; shape and dtype are equal everywhere."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array)) if jax.process_count() > 1 else array


def as_first_sees(todo: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The first process's ``todo``, on all of them: other replicas may record rows between one look and the
    next. ``rows``: all there are, equal everywhere. UserError where a process knows less than the first."""
    if jax.process_count() == 1:
        return list(todo)
    own = {row.id for row in todo}
    is_todo = first_has(np.array([row.id in own for row in rows], np.uint8))
    first = [row for row, is_todo in zip(rows, is_todo, strict=True) if is_todo]
    agree("ledger", [own <= {row.id for row in first}])
    return first


def least(number: int) -> int:
    """The least of all processes' numbers."""
    return int(np.min(multihost_utils.process_allgather(np.int32(number)))) if jax.process_count() > 1 else number


def all_say(yes: bool) -> bool:
    """Whether every process says yes."""
    return all(_exchange(int(yes)))


def all_have(has: Sequence[bool]) -> list[bool]:
    """Of several things, those that every process has."""
    if jax.process_count() == 1:
        return list(has)
    return np.all(multihost_utils.process_allgather(np.array(has, np.uint8)), axis=0).tolist()


def whole(array: jax.Array) -> np.ndarray:
    """All of a global array, on every host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def own(rows: Sequence[Row], *arrays: jax.Array) -> tuple[Sequence[Row], list[Any]]:
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


class Drain:
    """Whether the run has been asked to stop, asked once before each batch. The first SIGTERM or SIGINT
    lets the current batch finish; a second one, or one before ``draws``, ends the process at once (records
    on disk stay whole).

    In a replica of several processes a SIGTERM or SIGINT to any of them stops all before the same batch, by JAX's
    own notice of preemption.
    """

    def __init__(self) -> None:
        self._signalled = self._passed_on = self._draws = False
        self._step = 0
        self.stopped = False

    def draws(self) -> None:
        """From now on there are batches to finish."""
        self._draws = True

    def asked(self) -> bool:
        self._step += 1
        notice = jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._step)
        self.stopped = self.stopped or self._signalled or notice
        return self.stopped

    def _handle(self, number: int, _: object) -> None:
        if self._signalled:
            os._exit(Exit.PREEMPTED)
        self._signalled = True
        what = "finishing the current batch, then stopping" if self._draws else "stopped before anything was drawn"
        with contextlib.suppress(OSError):  # nobody may read it any more
            os.write(2, f"\nfluxbatch: {signal.Signals(number).name}: {what}\n".encode())
        if not self._draws:
            os._exit(Exit.PREEMPTED)

    def _pass_on(self, *_: object) -> None:
        """To JAX, which notices SIGTERM."""
        if self._passed_on:
            os._exit(Exit.PREEMPTED)
        self._passed_on = True
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def drain_on_signals() -> Iterator[Drain]:
    """Installs the handlers for the length of a run; none for SIGTERM where JAX has its own."""
    drain = Drain()
    alone = jax.process_count() == 1
    handlers = {signal.SIGTERM: drain._handle, signal.SIGINT: drain._handle} if alone else {signal.SIGINT: drain._pass_on}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield drain
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
