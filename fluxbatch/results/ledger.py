"""What is done, kept beside the output: a record makes its row done, and nothing else does.

.fluxbatch/job.json                   the facts of the job that every image depends on
.fluxbatch/records/WRITER-N.jsonl     a line an image: of one batch, one shard, or many shards
.fluxbatch/rejects/WRITER-N.jsonl     rows without an image, and why
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fluxbatch.config.schema import Container
from fluxbatch.results.file_names import Namer
from fluxbatch.results.images import Images
from fluxbatch.results.location import (
    FORMAT,
    HIDDEN,
    IMAGES,
    JOB,
    METADATA,
    REJECTS,
    WAY_OUT,
    container_facts,
    container_of,
    read_job,
    refuse_foreign,
    utc_now,
    write_status,
)
from fluxbatch.results.packed import open_images
from fluxbatch.results.resume import (
    NamesSeen,
    Record,
    RecordId,
    describe,
    difference,
    digest,
    id_of,
    key_under,
    match,
    paths_of,
    record_id,
    row_key,
    with_extra,
)
from fluxbatch.results.sorted_lines import SortedLines
from fluxbatch.storage.base import Store, join
from fluxbatch.storage.log import Log, json_line, object_of
from fluxbatch.types import Reject, Row, UserError

__all__ = [
    "HIDDEN",
    "IMAGES",
    "METADATA",
    "REJECTS",
    "Ledger",
    "Record",
    "Tally",
    "read_records",
    "remove",
    "row_key",
    "utc_now",
    "write_status",
]

RECORDS, REJECTED = HIDDEN + "records/", HIDDEN + "rejects/"
# what a record is read for
_NEEDS = frozenset({"id", "key", "index", "file_name", "seed", "height", "width", "sha256"})
_CHUNK = 10_000  # records in one object after the merge


@dataclasses.dataclass(frozen=True)
class Tally:
    """How the manifest stands; ``rows`` counts its bad lines too."""

    rows: int
    done: int
    rejects: tuple[Reject, ...]

    @property
    def left(self) -> int:
        return self.rows - self.done - len(self.rejects)


class Ledger:
    """The records of one output place, as one process sees and extends them; safe in threads.

    ``job_facts``: JSON-able, everything besides the row that decides its pixels.
    ``writer_id``: another one for every start of every process; letters, digits, ``-`` and ``_``.
    ``container``: what the images lie in.
    Raises UserError when the place holds a job of other facts, or images of unknown origin;
    with ``overwrite`` what the other job left is removed instead. Where several processes share
    a start, let one open the ledger before the others do.
    """

    def __init__(
        self,
        store: Store,
        job_facts: Mapping[str, object],
        *,
        writer_id: str,
        overwrite: bool = False,
        container: Container = Container.files,
    ):
        self._store = store
        self._container = container
        self.images: Images = open_images(store, container)
        self._facts = json.loads(json.dumps(job_facts))
        self._facts_digest = digest(self._facts)
        self._overwrite = overwrite
        self._records = Log(store, RECORDS, writer_id, _NEEDS)
        self._rejects = Log(store, REJECTED, writer_id, {"where", "reason", "id", "index", "created"})
        self._lock = threading.Lock()
        self._batches: dict[str, Sequence[Record]] = {}  # object → records, since the last compaction
        self._rows: dict[str, Row] = {}  # id → row of the manifest
        self._bad_lines: tuple[Reject, ...] = ()
        self._moved: dict[RecordId, Row] = {}  # record → the row that it makes done, under another id or key
        self._files: tuple[list[RecordId], list[str]] = [], []  # records and the names of their images
        self.unlisted = 0  # records that belong to no row of the manifest, as ``remaining`` saw them
        self.lost: list[str] = []  # images that were recorded and are not there, as ``remaining`` saw them
        self.compactions = 0  # calls of ``compact`` that are through
        self.committed = 0  # records of this process
        self._agree()
        store.sweep()

    def key(self, row: Row) -> str:
        """``row_key`` under this job's facts."""
        return key_under(row, self._facts_digest)

    def assign(
        self, rows: Sequence[Row], bad_lines: Sequence[Reject] = (), *, template: str, extension: str
    ) -> tuple[list[Row], dict[int, str]]:
        """The rows that have no image yet, and the file name of each by its ``row.index``.

        The manifest may be in another order, longer or shorter than when the records were made.
        The answer follows from rows and records alone. Records of rows that are gone are kept, unless ``overwrite``.
        Raises UserError when a row was changed since its image was made, unless ``overwrite``.
        """
        todo = self.remaining(rows, bad_lines)
        return todo, self.names(todo, template, extension)

    def remaining(self, rows: Sequence[Row], bad_lines: Sequence[Reject] = (), *, look: bool = False) -> list[Row]:
        """The first half of ``assign``. ``look`` whether every recorded image is there: one process of each start."""
        identities: list[RecordId] = []
        files: list[str] = []
        left: set[RecordId] = set()
        names, also, scanned = NamesSeen(), set[str](), set()
        for name, _, record in self._records.scan():
            scanned.add(name)
            if (identity := id_of(record)) not in left:
                left.add(identity)
                identities.append(identity)
                files.append(record["file_name"])
            else:  # the same, or what another start made of the row
                also.add(record["file_name"])
            names.saw(record)
        if twice := names.twice(self._all_lines):
            self._remove(lambda record: record["file_name"] in twice)
            return self.remaining(rows, bad_lines, look=look)
        # asked after the scan: an image is there before its record
        if look and files and (lost := self.images.missing(also.union(files))):
            # another replica may have made some again, and recorded them in an object of its own
            self._records.drop(lambda record: record["file_name"] in lost, scanned)
            self.lost = sorted(lost)
            return self.remaining(rows, bad_lines)
        self._moved, todo, changed = match(rows, self.key, left, self.records)
        if changed and not self._overwrite:
            raise UserError(*describe(changed), WAY_OUT)
        gone = {id_of(record) for _, record in changed}
        unlisted = left - self._moved.keys() - gone
        self.unlisted = len(unlisted)
        if self._overwrite and not bad_lines:  # a bad line may be that of a row which has its image
            gone |= unlisted
        if gone:
            self._remove(lambda record: id_of(record) in gone)
        self._rows = {row.id: row for row in rows}
        self.images.expect(row.extra for row in rows)
        self._bad_lines = tuple(bad_lines)
        if gone:
            files = [file for identity, file in zip(identities, files, strict=True) if identity not in gone]
            identities = [identity for identity in identities if identity not in gone]
        self._files = identities, files
        return todo

    def names(self, todo: Sequence[Row], template: str, extension: str) -> dict[int, str]:
        """The second half, once: the names do not depend on records of ``todo`` that came meanwhile, from others."""
        ids = {row.id for row in todo}
        theirs = {identity for identity, row in self._moved.items() if row.id in ids}
        theirs |= {record_id(row.id, self.key(row)) for row in todo} if self._files[0] else set()
        taken = [file for identity, file in zip(*self._files, strict=True) if identity not in theirs]
        self._files = [], []  # a fifth of a gigabyte of a million
        encoding = "utf-8" if "://" in self._store.url else sys.getfilesystemencoding()
        return Namer(template, extension, encoding).assign(todo, taken)

    def unmade(self, rows: Sequence[Row], starts: Iterable[str]) -> list[Row]:
        """Those of ``rows`` that no record of these starts (what their writer ids begin with) makes done."""
        records = (record for start in starts for _, _, record in self._records.scan(start))
        made = {row.id for record in records if (row := self._row_made_by(record))}
        return [row for row in rows if row.id not in made]

    def records(self) -> Iterator[Record]:
        """Every record once, in no particular order."""
        return _once(self._records)

    def _all_lines(self) -> Iterator[Record]:
        """Every record, some of them doubled."""
        return (record for _, _, record in self._records.scan())

    def commit(self, records: Sequence[Record]) -> None:
        """Makes rows done, all of them at once. Only when their images are durable."""
        if records:
            name = self._records.append(map(json_line, records))
            with self._lock:
                self._batches[name] = records
                self.committed += len(records)

    def reject(self, rejects: Sequence[Reject]) -> None:
        """Notes rows that got no image. The next start tries them again."""
        if rejects:
            now = utc_now()
            self._rejects.append(json_line({**dataclasses.asdict(reject), "created": now}) for reject in rejects)

    def compact(self) -> None:
        """Merges the objects that this process has committed since the last call into one."""
        with self._lock:
            batches, self._batches = self._batches, {}
        if len(batches) > 1:
            self._records.append(json_line(record) for records in batches.values() for record in records)
            self._records.delete(batches)
        self.compactions += 1

    def merge(self) -> Tally:
        """Writes metadata.jsonl (by index) and rejects.jsonl, compacts the ledger, and counts.

        Any process that called ``assign`` may merge, at any time and while others commit or
        merge: whoever writes last has read everything that was committed before.
        """
        twice: set[str] = set()  # names of images
        while True:
            with SortedLines() as lines:
                objects: dict[str, array[int]] = {}  # the lines that each is the first to have
                seen: set[bytes] = set()
                done: set[str] = set()
                names = NamesSeen()
                for name, line, said in self._records.scan():
                    first = objects.setdefault(name, array("q"))
                    names.saw(said)
                    identity = id_of(said)
                    if identity in seen or said["file_name"] in twice:  # these are to be made again
                        continue
                    seen.add(identity)
                    index, today = self._as_of_today(said, done)
                    if today == said:
                        first.append(lines.add(index, line))
                    else:  # it stands elsewhere now, or says more
                        first.append(lines.add(-1, line))
                        lines.add(index, json_line(today))
                del seen
                if not (found := names.twice(self._all_lines)) <= twice:
                    twice |= found
                    continue
                lines.write_to(self._store, METADATA)
                rejects, reject_objects = self._merge_rejects(done)
                unseen = {*self._records.names(), *self._rejects.names()} - objects.keys() - reject_objects
                if unseen:
                    continue
                if not twice:  # else the next start is to see every record
                    self._compact_all(objects, lines)
                return Tally(len(self._rows) + len(self._bad_lines), len(done), rejects)

    def _as_of_today(self, record: Record, done: set[str]) -> tuple[int, Record]:
        """The index and the record as metadata.jsonl has them; its row is ``done``."""
        index = record["index"]
        if row := self._row_made_by(record):
            done.add(row.id)
            index = row.index
            record = with_extra({**record, "id": row.id, "index": index, **paths_of(row)}, row)
        return index, self.images.located(record)

    def _merge_rejects(self, done: set[str]) -> tuple[tuple[Reject, ...], set[str]]:
        """Writes rejects.jsonl: what stands against rows of this manifest that are not done."""
        latest: dict[str, dict[str, Any]] = {}
        objects = set()
        for name, _, line in self._rejects.scan():
            objects.add(name)
            if line["id"] in self._rows and line["id"] not in done:
                known = latest.setdefault(line["id"], line)
                latest[line["id"]] = max(known, line, key=lambda each: each["created"])
        rejects = [Reject(line["where"], line["reason"], line["id"], line["index"]) for line in latest.values()]
        rejects = sorted([*self._bad_lines, *rejects], key=lambda reject: reject.index or 0)
        if rejects:
            self._store.write(REJECTS, b"".join(json_line(self._reject_line(reject)) for reject in rejects))
        else:
            self._store.delete(REJECTS)
        return tuple(rejects), objects

    def _reject_line(self, reject: Reject) -> dict[str, object]:
        row = self._rows.get(reject.id) if reject.id is not None else None
        line = {"where": reject.where, "index": reject.index, "id": reject.id}
        prompt = row.prompt if row else reject.prompt
        return {**line, **({"prompt": prompt} if prompt is not None else {}), "reason": reject.reason}

    def _compact_all(self, objects: Mapping[str, array[int]], lines: SortedLines) -> None:
        """Small objects into large ones, so that a million rows end in about a hundred."""
        with self._lock:
            self._batches = {}
        small = [name for name, first in objects.items() if len(first) < _CHUNK // 2]
        if len(small) < 2:
            return
        places = [place for name in small for place in objects[name]]
        for start in range(0, len(places), _CHUNK):
            self._records.append(map(lines.line, places[start : start + _CHUNK]))
        self._records.delete(small)

    def _row_made_by(self, record: Record) -> Row | None:
        if self._moved and (moved := self._moved.get(id_of(record))):
            return moved
        row = self._rows.get(record["id"])
        return row if row is not None and self.key(row) == record["key"] else None

    def _remove(self, unwanted: Callable[[Record], bool]) -> None:
        remove(self._store, self._records, unwanted, self.images)

    def _agree(self) -> None:
        """Stores the job's facts on the first start, and compares them on every later one."""
        stored = read_job(self._store)
        if stored is None:
            if not self._overwrite:
                refuse_foreign(self._store)
            if self._store.write(JOB, self._facts_document(), if_absent=True):
                return
            stored = read_job(self._store) or {}
        if (found := stored.pop("layout", 1)) != FORMAT and not self._overwrite:
            other = f"layout {found}, expected {FORMAT}: another version of fluxbatch made this run"
            raise UserError(f"{join(self._store.url, JOB)}: {other}; {WAY_OUT}")
        there = open_images(self._store, container_of(stored))
        changed = difference(stored, container_facts(self._container) | self._facts)
        # until there is a record, a changed configuration costs nothing
        if changed and not self._overwrite and next(self.records(), None):
            raise UserError(f"{self._store.url}: holds a job with another configuration", *changed, WAY_OUT)
        if changed or found != FORMAT:
            remove(self._store, self._records, lambda record: True, there)
            self._rejects.delete(self._rejects.names())
            self._store.write(JOB, self._facts_document())

    def _facts_document(self) -> bytes:
        document = {"layout": FORMAT, **container_facts(self._container), **self._facts}
        return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def read_records(store: Store) -> Iterator[Record]:
    """Every record of the place once; from metadata.jsonl where the ledger was not copied along."""
    log = Log(store, RECORDS, "reader", _NEEDS)
    if log.names() or not store.exists(METADATA):
        return _once(log)
    place = join(store.url, METADATA)
    return (
        object_of(line, f"{place}:{number}", _NEEDS) for number, line in enumerate(store.read(METADATA).splitlines(), 1)
    )


def _once(log: Log) -> Iterator[Record]:
    seen: set[RecordId] = set()
    for _, _, record in log.scan():
        if id_of(record) not in seen:
            seen.add(id_of(record))
            yield record


def remove(store: Store, log: Log, unwanted: Callable[[Record], bool], images: Images) -> None:
    """Removes records and then their images, so that no record is ever without its image."""
    scanned: set[str] = set()
    files: set[str] = set()
    kept: set[str] = set()
    for name, _, record in log.scan():
        scanned.add(name)
        (files if unwanted(record) else kept).add(record["file_name"])
    if not files:
        return
    store.delete(METADATA)  # it lists them too, until the next merge
    images.release(sorted(files - kept))
    log.drop(unwanted, scanned)
    images.delete(sorted(files - kept))
