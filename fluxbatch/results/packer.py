"""From the spool into shards, in a thread of its own: behind the device, and behind the writing of images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from fluxbatch.config.schema import Output
from fluxbatch.results.images import Images, Record
from fluxbatch.results.packed import AT_ONCE, Packed
from fluxbatch.results.shard_files import Item

SHARD_BYTES = 1_000_000_000  # of images, where nothing says how many rows a shard has
HELD_BYTES = 256_000_000  # of images that wait, kept in memory too: they need not be read again to be packed
_NOTHING: Mapping[str, bytes] = {}


class Packer:
    """Packs the recorded images of one process, a full shard at a time; the rest waits for ``finish``.

    Without shards it only calls what it is given, in order. Errors come out of the futures and of ``close``.
    """

    def __init__(self, images: Images, output: Output):
        self._images = images if isinstance(images, Packed) else None
        self._output = output
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pack")
        self._tasks: list[Future[None]] = []
        self._lock = threading.Lock()
        self._waiting: list[Record] = []
        self._bytes = 0  # of these
        self._held: dict[str, bytes] = {}  # file name → some of them
        self._room = HELD_BYTES  # for more, with those that are being packed

    def add(self, records: Sequence[Record], files: Mapping[str, bytes]) -> None:
        """Images that are recorded: ``files``, by name. Raises what went wrong with earlier ones."""
        for task in self._tasks:
            if task.done():
                task.result()
        if self._images is None:
            return
        with self._lock:
            self._waiting += records
            self._bytes += (size := sum(map(len, files.values())))
            if size <= self._room:
                self._held |= files
                self._room -= size
            if not _is_full(self._output, len(self._waiting), self._bytes):
                return
            count = self._output.rows_per_shard or len(self._waiting)
            full = len(self._waiting) // count * count
            whole, self._waiting = self._waiting[:full], self._waiting[full:]
            self._bytes = 0  # where rows count it decides nothing
            names = [record["file_name"] for record in whole]
            held = {name: self._held.pop(name) for name in names if name in self._held}
        self.then(lambda: self._pack(whole, held))

    def _pack(self, records: Sequence[Record], held: Mapping[str, bytes]) -> None:
        pack(self._images, records, self._output, held)
        with self._lock:
            self._room += sum(map(len, held.values()))

    def then(self, task: Callable[[], None]) -> Future[None]:
        """Call it once all that is full by now is packed."""
        future = self._thread.submit(task)
        self._tasks = [*(each for each in self._tasks if not each.done() or each.exception()), future]
        return future

    def close(self) -> None:
        """Wait until all that is full is packed. Raises what went wrong first."""
        self._thread.shutdown()
        for task in self._tasks:
            task.result()


def pack(
    images: Packed | None, records: Iterable[Record], output: Output, held: Mapping[str, bytes] = _NOTHING
) -> None:
    """Pack all of them, in their order. An image that is gone from the spool is passed over. ``held``: what some of
    them are there, which need not be read."""
    assert images is not None
    items: list[Item] = []
    size = 0
    for record, image in _spooled(images, records, held):
        if image is None:
            continue
        items.append(Item(record, image))
        size += len(image)
        if _is_full(output, len(items), size):
            images.pack(items)
            items, size = [], 0
    if items:
        images.pack(items)


def finish(images: Images, records: Callable[[], Iterable[Record]], output: Output) -> None:
    """Pack what is left in the spool, a short shard at the end; remove from it what nothing records.

    Only where all processes have recorded what they made, and none is at work.
    """
    if not isinstance(images, Packed):
        return
    images.recover()
    left = images.spooled()
    if left:
        waiting = [record for record in records() if record["file_name"] in left]
        pack(images, sorted(waiting, key=lambda record: record["index"]), output)
        images.delete(images.spooled() & left)


def _is_full(output: Output, rows: int, size: int) -> bool:
    return size >= SHARD_BYTES if output.rows_per_shard is None else rows >= output.rows_per_shard


def _spooled(
    images: Packed, records: Iterable[Record], held: Mapping[str, bytes]
) -> Iterator[tuple[Record, bytes | None]]:
    there = images.still_spooled(held.keys()) if held else set[str]()  # one look for all that need not be read
    records = iter(records)
    while window := list(islice(records, AT_ONCE)):
        names = [record["file_name"] for record in window]
        found = images.from_spool(name for name in names if name not in there)
        yield from zip(window, (held[name] if name in there else found.get(name) for name in names), strict=True)
