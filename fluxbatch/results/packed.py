"""Images in shards. Until a shard is full its images wait in a spool beside the ledger.

.fluxbatch/spool/TIME-ID             images of a batch, or of a few, that were recorded together
.fluxbatch/shards/shard-000000.json  which images a shard has, and where in it
shard-000000.tar                     the shard

A recorded image is durable at every instant: in the spool, in a shard, or in both. To pack is to write the index, then
the shard, then to delete those objects of the spool of which every image lies in a shard. So a shard that is there is
whole and has an index, and an index without its shard is one that a kill left behind, or somebody deleted the shard:
it counts for nothing.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice
from typing import Any

from fluxbatch.config.schema import Container
from fluxbatch.results.images import Files, Images, Record
from fluxbatch.results.location import HIDDEN, container_of, read_job
from fluxbatch.results.shard_files import Item, Place, column_kinds, open_format
from fluxbatch.results.spool import Spool
from fluxbatch.storage.base import NotFound, StorageError, Store, join
from fluxbatch.storage.log import in_parallel

INDEX = HIDDEN + "shards/"
AT_ONCE = 32  # images read before the next are asked for


class Packed:
    """``Images`` of a run whose container is not ``files``."""

    together = 4  # more would only cost more when killed: so many go into a bucket in the time of two requests

    def __init__(self, store: Store, container: Container):
        self._store = store
        self._spool = Spool(store)
        self._format = open_format(container)
        self._kinds: Mapping[str, str] = {}
        self._lock = threading.Lock()
        self._taken: set[str] | None = None  # indexes that are there, as of the last look
        self._places: dict[str, tuple[str, Place]] | None = None  # file name → shard and place, as of the last look
        self._again: set[str] = set()  # shards with an image that an earlier one has as well, likewise

    # ---- one by one

    def read(self, name: str) -> bytes:
        try:
            return self._read(name)
        except NotFound:
            self._look()  # it may have gone into a shard since the last one
            return self._read(name)

    def _read(self, name: str) -> bytes:
        found = self._shards().get(name)
        return self._format.read(self._store, *found) if found else self._spool.read(name)

    def write(self, name: str, data: bytes) -> None:
        """Nothing: they are written together."""

    def write_together(self, images: Mapping[str, bytes]) -> None:
        if images:
            self._spool.write(images)

    def missing(self, names: Set[str]) -> set[str]:
        there = self._look()
        spooled = self._spool.names()
        return {name for name in names if name not in spooled and name not in there}

    def list(self) -> Iterator[str]:
        there = self._look()
        return iter(sorted({*self._spool.names(), *there}))

    def located(self, record: Mapping[str, Any]) -> Record:
        shard, _ = self._shards().get(record["file_name"], ("", None))
        return {"file_name": record["file_name"], "shard": shard, **{k: v for k, v in record.items() if k != "shard"}}

    def release(self, names: Iterable[str]) -> None:
        """Back into the spool with all that their shards hold; then these shards are deleted."""
        there = self._look()
        self._dissolve({there[name][0] for name in names if name in there})

    def _dissolve(self, shards: Set[str]) -> None:
        """Back into the spool with what only these shards hold; then they are deleted."""
        for shard in sorted(shards):
            inside = {name: place for name, (where, place) in self._shards().items() if where == shard}
            left = iter(inside.items())
            while window := list(islice(left, AT_ONCE)):
                found = in_parallel(lambda item: self._unpack(shard, *item), window)  # noqa: B023
                self.write_together({name: data for name, data in found if data})
            self._store.delete(shard)
            self._store.delete(_index_of(shard))
        self._look()

    def _unpack(self, shard: str, name: str, place: Place) -> tuple[str, bytes]:
        try:
            return name, self._format.read(self._store, shard, place)
        except ValueError:  # damaged: the next start makes it again
            return name, b""

    def delete(self, names: Iterable[str]) -> None:
        self._spool.delete(names)

    def expect(self, extras: Iterable[Mapping[str, Any]]) -> None:
        self._kinds = column_kinds(extras)

    # ---- shards

    def spooled(self) -> set[str]:
        """The names of the images that wait, as of the last look."""
        return self._spool.names()

    def still_spooled(self, names: Set[str]) -> set[str]:
        """Those of ``names`` that wait now."""
        return self._spool.still_there(names)

    def from_spool(self, names: Iterable[str]) -> dict[str, bytes]:
        """Images that wait; without those that are gone."""
        return self._spool.read_all(names)

    def pack(self, items: Sequence[Item]) -> None:
        """Move images from the spool into a shard of their own."""
        data, places = self._format.pack(items, self._kinds)
        names = [item.record["file_name"] for item in items]
        index = json.dumps(dict(zip(names, places, strict=True)), ensure_ascii=False).encode() + b"\n"
        taken = self._taken = set(self._store.list(INDEX)) if self._taken is None else self._taken
        for number in itertools.count():
            shard = f"shard-{number:06}{self._format.extension}"
            if _index_of(shard) in taken:
                continue
            taken.add(_index_of(shard))
            if not self._store.write(_index_of(shard), index, if_absent=True):
                continue
            if self._store.write(shard, data, if_absent=True):
                if self._store.exists(_index_of(shard)):
                    break
                self._store.delete(shard)  # a start that thought itself alone has taken it for a killed one's
                raise StorageError(f"{join(self._store.url, shard)}: another start packs there as well", fatal=True)
            self._store.delete(_index_of(shard))  # the file is not of this run
            raise StorageError(
                f"{join(self._store.url, shard)}: is there already, and no shard of this run", fatal=True
            )
        with self._lock:
            if self._places is not None:
                self._places |= {name: (shard, place) for name, place in zip(names, places, strict=True)}
        self._spool.forget(names)
        self._spool.sweep()

    def recover(self) -> None:
        self._look()
        if self._again:  # a replica that was taken for lost lived on
            self._dissolve(self._again)
        there = self._shards()
        shards = {_index_of(shard) for shard, _ in there.values()}
        self._store.delete(*[name for name in self._store.list(INDEX) if name not in shards])
        self._spool.sweep()

    def _shards(self) -> Mapping[str, tuple[str, Place]]:
        places = self._places
        return self._look() if places is None else places

    def _look(self) -> Mapping[str, tuple[str, Place]]:
        """Which images lie in which shards now, and which wait."""
        self._spool.look()  # before the shards: what goes from here meanwhile, is there then
        names = list(self._store.list(INDEX))
        shards = [name.removeprefix(INDEX).removesuffix(".json") + self._format.extension for name in names]
        gone = self._store.missing(set(shards)) if shards else set()
        places: dict[str, tuple[str, Place]] = {}
        again: set[str] = set()
        for shard, data in zip(shards, in_parallel(self._read_index, names), strict=True):
            for name, place in data.items() if shard not in gone else ():
                if places.setdefault(name, (shard, (place[0], place[1])))[0] != shard:
                    again.add(shard)
        with self._lock:
            self._places, self._again, self._taken = places, again, None
        self._spool.forget(places)
        return places

    def _read_index(self, name: str) -> dict[str, Any]:
        """Empty: it is gone."""
        try:
            index = json.loads(self._store.read(name))
        except NotFound:
            return {}
        except ValueError:
            raise StorageError(f"{join(self._store.url, name)}: not JSON; is the disk damaged?", fatal=True) from None
        return index if isinstance(index, dict) else {}


def open_images(store: Store, container: Container | None = None) -> Images:
    """The images of the run there. ``container``: None: as its job.json says."""
    container = container or container_of(read_job(store))
    return Files(store) if container is Container.files else Packed(store, container)


def _index_of(shard: str) -> str:
    return f"{INDEX}{shard.rpartition('.')[0]}.json"
