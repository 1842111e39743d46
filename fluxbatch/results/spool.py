"""Where images wait that lie in no shard yet: those of a batch, or of a few, in one object.

An object is a line of JSON, which says where each image begins and how many bytes it has, and then the images. It is
never changed. Its name begins with the time: where two hold an image of one name, as the first was killed before it was
recorded and the row made again, the newer one counts.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterable, Mapping, Set

from fluxbatch.results.location import HIDDEN
from fluxbatch.results.shard_files import Place
from fluxbatch.storage.base import NotFound, Store
from fluxbatch.storage.log import in_parallel, json_line

SPOOL = HIDDEN + "spool/"
_HEAD = 16 << 10  # bytes read first of an object: as a rule its first line is shorter


class Spool:
    """Safe in threads. What it knows is what it wrote itself, and what the last ``look`` found."""

    def __init__(self, store: Store):
        self._store = store
        self._lock = threading.Lock()
        self._objects: dict[str, Mapping[str, Place]] = {}  # object → its images
        self._waiting: dict[str, str] = {}  # image → the object that holds it

    def look(self) -> None:
        """Find what is there now."""
        begun = _name()
        known, names = self._objects, list(self._store.list(SPOOL))
        heads = dict(zip(names, in_parallel(lambda name: known.get(name) or self._images_of(name), names), strict=True))
        with self._lock:
            self._objects = {name: head for name, head in heads.items() if head is not None} | {
                name: head for name, head in self._objects.items() if name > begun
            }
            self._waiting = {image: name for name in sorted(self._objects) for image in self._objects[name]}

    def names(self) -> set[str]:
        """Of the images that wait."""
        return set(self._waiting)

    def still_there(self, images: Set[str]) -> set[str]:
        """Those of ``images`` whose objects nobody else has removed, in one look."""
        names = set(self._store.list(SPOOL))
        return {image for image in images if self._waiting.get(image) in names}

    def write(self, images: Mapping[str, bytes]) -> None:
        """Put them there, in one object."""
        places, start = {}, 0
        for image, data in images.items():
            places[image] = start, len(data)
            start += len(data)
        head, name = json_line(places), _name()
        self._store.write(name, b"".join([head, *images.values()]))
        with self._lock:
            self._objects[name] = _shifted(places, len(head))
            self._waiting |= dict.fromkeys(images, name)

    def read(self, image: str) -> bytes:
        """One image. ``NotFound`` when it is not there."""
        if (data := self.read_all([image]).get(image)) is None:
            raise NotFound(f"{image}: not in the spool")
        return data

    def read_all(self, images: Iterable[str]) -> dict[str, bytes]:
        """Those of ``images`` that are there. What lies side by side is read at once."""
        with self._lock:
            found = sorted((name, *self._objects[name][image], image) for image in images
                           if (name := self._waiting.get(image)))  # fmt: skip
        parts: list[list[tuple[str, int, int, str]]] = []
        for name, start, size, image in found:
            if parts and parts[-1][-1][0] == name and sum(parts[-1][-1][1:3]) == start:
                parts[-1].append((name, start, size, image))
            else:
                parts.append([(name, start, size, image)])
        return {image: data for part in in_parallel(self._read, parts) for image, data in part}

    def _read(self, part: list[tuple[str, int, int, str]]) -> list[tuple[str, bytes]]:
        (name, first, *_), (_, last, size, _) = part[0], part[-1]
        try:
            data = self._store.read_range(name, first, last + size - first)
        except NotFound:
            return []
        return [(image, data[start - first :][:size]) for _, start, size, image in part]

    def forget(self, images: Iterable[str]) -> None:
        """They lie in shards."""
        with self._lock:
            for image in images:
                self._waiting.pop(image, None)

    def sweep(self) -> None:
        """Remove the objects of which no image waits."""
        with self._lock:
            empty = sorted(self._objects.keys() - set(self._waiting.values()))
        self._drop(empty)

    def delete(self, images: Iterable[str]) -> None:
        """Remove images: what else their objects hold goes into new ones before."""
        gone = set(images)
        old = [(name, list(inside)) for name, inside in self._objects.items() if not gone.isdisjoint(inside)]
        for name, inside in old:
            kept = [image for image in inside if image not in gone and self._waiting.get(image) == name]
            if data := self.read_all(kept):
                self.write(data)
        self.forget(gone)
        self._drop([name for name, _ in old])

    def _drop(self, names: list[str]) -> None:
        self._store.delete(*names)
        with self._lock:
            for name in names:
                self._objects.pop(name, None)

    def _images_of(self, name: str) -> Mapping[str, Place] | None:
        """None: it is gone, or not ours."""
        size = _HEAD
        try:
            while b"\n" not in (head := self._store.read_range(name, 0, size)) and len(head) == size:
                size *= 8
            line = head.partition(b"\n")[0]
            places = {image: (start, count) for image, (start, count) in json.loads(line).items() if count}
        except (NotFound, ValueError, TypeError, AttributeError):
            return None
        return _shifted(places, len(line) + 1)


def _shifted(places: Mapping[str, Place], by: int) -> dict[str, Place]:
    return {image: (start + by, size) for image, (start, size) in places.items() if size}


def _name() -> str:
    return f"{SPOOL}{time.time_ns():020}-{secrets.token_hex(4)}"
