"""The output place of a run: what a start writes there besides images, and whether it may."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from fluxbatch.config.schema import Container, Job, manifests
from fluxbatch.storage.base import NotFound, Store, join
from fluxbatch.storage.registry import find_files, open_store
from fluxbatch.types import UserError

METADATA, REJECTS, STATUS, CONFIG = "metadata.jsonl", "rejects.jsonl", "status.json", "config.yaml"
CARD = "README.md"
RESERVED = (METADATA, REJECTS, STATUS, CONFIG, CARD, "index.html")
SHARDS = (".tar", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
HIDDEN = ".fluxbatch/"  # Hugging Face's ImageFolder passes over what begins with a dot
SHEET = HIDDEN + "contact_sheet.png"  # of the pictures in sight each has a record, or no ImageFolder loads
JOB = HIDDEN + "job.json"  # no start writes anything before it but the lock
FORMAT = 2  # of all that lies in the hidden folder and of the records; job.json says it
REPLICAS = HIDDEN + "replicas/"  # the sign of life of each, where there are several
LOCK = HIDDEN + "lock"  # held by the start that is at work
PICTURES = HIDDEN + "pictures.jsonl"  # digests of what rows read, so that the next start need not read it all again
WAY_OUT = "give another run_name=…, or overwrite=true to replace what differs"


def open_location(job: Job) -> Store:
    """The job's store. UserError where a run would write over its own manifest or over somebody's files."""
    assert job.run_name is not None
    store = open_store(join(job.output_dir, job.run_name))
    paths = [path for given in manifests(job) for path in find_files(given)]
    for name in RESERVED:
        if own := next((path for path in paths if _is_one(path, join(store.url, name))), None):
            raise UserError(
                f"manifest={own}: the run would write its {name} there; give another run_name=… or output_dir=…"
            )
    if not job.overwrite:
        refuse_foreign(store)
        if job.sweep and job.output.gallery:
            _refuse_foreign_page(open_store(join(job.output_dir, *job.run_name.split("/")[:-1])))
    return store


def refuse_foreign(store: Store) -> None:
    """UserError where no job has begun, and there are images, or files that a run would write over."""
    if store.exists(JOB):
        return
    foreign = next((name for name in store.list() if name.endswith((*IMAGES, *SHARDS)) or name in RESERVED), None)
    # another process may have begun this very job between the two looks
    if foreign and not store.exists(JOB):
        raise UserError(f"{join(store.url, foreign)}: is there already, without a record; {WAY_OUT}")


def read_job(store: Store) -> dict[str, Any] | None:
    """What decides the pixels of the job there, and its ``layout``; None where no start has been."""
    try:
        job = json.loads(store.read(JOB))
    except NotFound:
        return None
    except ValueError:
        job = None
    if not isinstance(job, dict):
        raise UserError(f"{join(store.url, JOB)}: not a JSON object; restore it, or give another run_name=…")
    return job


def container_facts(container: Container) -> dict[str, str]:
    """What job.json says of what images lie in; nothing of files."""
    return {} if container is Container.files else {"container": container.name}


def container_of(job: Mapping[str, Any] | None) -> Container:
    """The container of a run by what its job.json says."""
    name = (job or {}).get("container", Container.files.name)
    if name not in Container.__members__:
        raise UserError(f"{JOB}: container: got {name!r}, expected one of {', '.join(Container.__members__)}")
    return Container[name]


def _refuse_foreign_page(root: Store) -> None:
    """UserError where a sweep's page would replace somebody's, or that of a run by itself."""
    page = "index.html"
    if root.exists(page) and (
        root.exists(JOB) or not any(name.endswith(f"/{JOB}") and name.count("/") == 2 for name in root.list())
    ):
        raise UserError(f"{join(root.url, page)}: is there already, and no sweep's; {WAY_OUT}")


def _is_one(path: str, other: str) -> bool:
    """Whether two addresses are of one file."""
    return path == other or (os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other))


def runs(job: Job) -> Iterator[Store]:
    """The run that is named, or all that lie in the output place."""
    place = join(job.output_dir, *([job.run_name] if job.run_name else []))
    names = {run for name in open_store(place).list() if (run := _run_of(name)) is not None}
    if not names:
        raise UserError(f"{place}: no run in it; expected output_dir=… (and run_name=…) of a run")
    return (open_store(join(place, *filter(None, [name]))) for name in sorted(names))


def _run_of(name: str) -> str | None:
    """The directory of the run that a file tells of."""
    place, _, file = f"/{name}".rpartition("/")
    if file == METADATA:
        return place[1:]
    return f"{place}/".partition(f"/{HIDDEN}")[0][1:] if f"/{HIDDEN}" in f"{place}/" else None


def utc_now() -> str:
    """The time in ISO format, UTC, with microseconds: as text it sorts by time."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def write_status(
    store: Store, exit_code: int | None, reason: str, counts: Mapping[str, int], **figures: Mapping[str, float]
) -> None:
    """status.json: what the exit code says, for launchers that lose it; None while the run goes on."""
    status = {
        "exit_code": None if exit_code is None else int(exit_code),
        "reason": reason,
        "counts": dict(counts),
        **figures,
        "time": utc_now(),
    }
    store.write(STATUS, json.dumps(status, indent=2).encode() + b"\n")
