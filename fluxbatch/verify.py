"""``python -m fluxbatch.verify output_dir=… [run_name=…]``: checks every record against its image.

Lists images that are missing, damaged or orphaned (without a record); exit code 0 when there are
none, else 3. ``repair=true`` forgets the records of missing and damaged images, so that the next
start of the same job makes them again. Without ``run_name`` every run in the place is checked.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NoReturn

from tqdm import tqdm

from fluxbatch.config import application
from fluxbatch.config.schema import Job
from fluxbatch.results.damage import fault_of
from fluxbatch.results.ledger import RECORDS, Record, read_records, remove
from fluxbatch.results.location import LOCK, runs
from fluxbatch.results.packed import open_images
from fluxbatch.storage.base import Store, join
from fluxbatch.storage.log import Log, in_parallel
from fluxbatch.types import Exit, UserError

_AT_ONCE = 64  # images read and decoded before the next are asked for


@dataclasses.dataclass
class VerifyJob(Job):
    repair: bool = False  # true: forget what is missing or damaged, so that the next start makes it again


@dataclasses.dataclass(frozen=True)
class Findings:
    """File names; of ``damaged`` with what is wrong."""

    images: int
    missing: tuple[str, ...]
    damaged: dict[str, str]
    orphaned: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.damaged or self.orphaned)


def verify(job: VerifyJob) -> int:
    """Checks the run, or every run below ``job.output_dir``, and prints what it finds."""
    found = [_report(store, job.repair) for store in runs(job)]
    return Exit.REJECTED_ROWS if any(found) else Exit.OK


def check(store: Store) -> Findings:
    """Every record of one run against its image, and every image against the records."""
    images = open_images(store)
    missing, damaged, recorded = [], {}, set()
    records = tqdm(read_records(store), desc=store.url, unit="image", disable=None, leave=False)
    for window in _windows(records):
        for record, fault in zip(window, in_parallel(lambda record: fault_of(images, record), window), strict=True):
            recorded.add(record["file_name"])
            if fault is None:
                missing.append(record["file_name"])
            elif fault:
                damaged[record["file_name"]] = fault
    orphaned = [name for name in images.list() if name not in recorded]
    return Findings(len(recorded), tuple(missing), damaged, tuple(orphaned))


def _report(store: Store, repair: bool) -> Findings:
    found = check(store)
    print(
        f"{store.url}: {found.images} records, {len(found.missing)} images missing, "
        f"{len(found.damaged)} damaged, {len(found.orphaned)} without a record"
    )
    for name in found.missing:
        print(f"  missing   {name}")
    for name, fault in found.damaged.items():
        print(f"  damaged   {name}: {fault}")
    for name in found.orphaned:
        print(f"  orphaned  {name}")
    if repair and (found.missing or found.damaged):
        bad = {*found.missing, *found.damaged}
        log = Log(store, RECORDS, f"repair-{secrets.token_hex(4)}")
        if not log.names():
            raise UserError(
                f"{join(store.url, RECORDS)}: not there, so repair=true has no records to forget; expected it to be "
                "copied along"
            )
        with store.hold(LOCK, shared=False):  # a start at work would write the records of its shard again
            remove(store, log, lambda record: record["file_name"] in bad, open_images(store))
        print(f"  repaired  {len(bad)} rows are to be made again: start the same job once more")
    return found


def _windows(records: Iterable[Record]) -> Iterator[list[Record]]:
    records = iter(records)
    while window := list(islice(records, _AT_ONCE)):
        yield window


def main() -> NoReturn:
    application.main(
        verify,
        schema=VerifyJob,
        rows=False,
        about="verify: check every record against its image (output_dir=…, run_name=…, repair=true).",
    )


if __name__ == "__main__":
    main()
