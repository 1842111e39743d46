"""The pages of a run that is still at work: from its first shard on, every few minutes, at bounded cost."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fluxbatch.results.contact_sheet import write_contact_sheet
from fluxbatch.results.gallery import thin, write_gallery
from fluxbatch.results.images import Files, Images
from fluxbatch.results.ledger import RECORDS
from fluxbatch.results.location import HIDDEN
from fluxbatch.storage.base import NotFound, Store
from fluxbatch.storage.log import in_parallel

EVERY = 180.0  # seconds without a new page, at the least
SHARE = 0.02  # of the time, at most, goes into pages: what takes long is done more seldom
ROWS, THUMBNAILS = 1000, 96  # of a page; of one that carries its images, which are read for it
_OBJECTS = (16, 256)  # of records, read for it: more where the fewer have too little
_BYTES = 256 << 10  # read of each
_MARK = HIDDEN + "pages.json"  # when one of several replicas last wrote them


class LivePages:
    """Writes ``index.html`` and the contact sheet with a choice of what is recorded.

    ``counts``: of this replica's rows. ``alone``: whether there is no other replica, or they take turns. ``folders``:
    where relative paths of the pictures that images were made of may begin.
    """

    def __init__(
        self,
        store: Store,
        images: Images,
        title: str,
        counts: Callable[[], Mapping[str, int]],
        *,
        alone: bool,
        folders: Sequence[str] = (),
    ):
        self._store, self._images, self._title, self._counts, self._alone = store, images, title, counts, alone
        self._folders = folders
        self._next = 0.0  # on the monotonic clock

    def refresh(self) -> None:
        """Write the pages if it is time. To be called while the run cannot have ended: what it writes then must come
        after this. Never fails: the pages are written again."""
        begun = time.monotonic()
        if begun < self._next:
            return
        with contextlib.suppress(Exception):
            self._next = begun + EVERY
            if self._alone or self._is_my_turn():
                self._write()
                took = time.monotonic() - begun
                self._next = time.monotonic() + max(EVERY, took / SHARE - took)

    def _is_my_turn(self) -> bool:
        now = time.time()
        with contextlib.suppress(NotFound, ValueError, KeyError, TypeError):
            if 0 <= now - json.loads(self._store.read(_MARK))["time"] < EVERY:
                return False
        self._store.write(_MARK, json.dumps({"time": now}).encode())
        return True

    def _write(self) -> None:
        in_shards = not isinstance(self._images, Files)
        now = datetime.datetime.now(datetime.UTC)
        records = self._choice(THUMBNAILS if in_shards else ROWS)
        counts = self._counts()
        summary: dict[str, Any] = {"images so far": counts["made"] + counts["before"]} if self._alone else {}
        if "left" in counts:
            summary |= {"left": counts["left"], "rejected": counts["rejected"] or None}
        note = f"The run was at work when this page was written, {now:%Y-%m-%d %H:%M} UTC: a choice of its images."
        images = self._images if in_shards else None
        write_gallery(self._store, records, (), self._title, summary, images, self._folders, note=note)
        write_contact_sheet(self._store, self._images, records, title=self._title, folders=self._folders)

    def _choice(self, limit: int) -> list[dict[str, Any]]:
        """Records from all over the ledger, by index; neighbours among them, as they lie in one shard."""
        names = list(self._store.list(RECORDS))
        found: dict[str, dict[str, Any]] = {}
        for objects in _OBJECTS:
            for lines in in_parallel(self._lines, thin(names, objects)[0]):
                found |= {record["file_name"]: record for record in lines}
            if len(found) >= limit:
                break
        return sorted(thin(found.values(), limit)[0], key=lambda record: record["index"])

    def _lines(self, name: str) -> list[dict[str, Any]]:
        try:
            data = self._store.read_range(name, 0, _BYTES)
        except NotFound:  # compacted meanwhile
            return []
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
