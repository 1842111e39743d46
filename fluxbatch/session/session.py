"""A run as one object: opened before a weight is read, worked through shard by shard, closed with an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

from fluxbatch.config.schema import STANDARD_INPUT, Job, manifests
from fluxbatch.distributed import backend
from fluxbatch.distributed.process_group import ProcessGroup
from fluxbatch.distributed.shutdown import Drain, drain_on_signals
from fluxbatch.generation.kept import KeptPipeline
from fluxbatch.generation.model_spec import ModelSpec, open_model_spec
from fluxbatch.generation.pictures import Reader
from fluxbatch.generation.prompts import TextCache
from fluxbatch.manifest.digests import Digests
from fluxbatch.manifest.pictures import inspect
from fluxbatch.manifest.rows import read_rows
from fluxbatch.reporting import startup_warnings
from fluxbatch.reporting.terminal import Report
from fluxbatch.results.image_files import EXTENSIONS
from fluxbatch.results.inputs import folders_of
from fluxbatch.results.ledger import Ledger
from fluxbatch.results.live import LivePages
from fluxbatch.results.location import LOCK, PICTURES, open_location
from fluxbatch.results.shard_files import require_package
from fluxbatch.results.writer import TooManyFailures
from fluxbatch.session.finalize import Outcome
from fluxbatch.session.generator import Generator
from fluxbatch.session.output import Output
from fluxbatch.shards import assignment
from fluxbatch.shards.assignment import Work
from fluxbatch.storage import cache
from fluxbatch.storage.base import StorageError, Store
from fluxbatch.types import Batch, Exit, Reject, Row, Shard, UserError


@dataclasses.dataclass
class Session:
    """What the steps of a run share. ``exit_code`` holds once the session is closed."""

    job: Job
    group: ProcessGroup
    drain: Drain
    report: Report
    spec: ModelSpec
    rows: Sequence[Row]  # the whole manifest
    todo: Sequence[Row]  # those that had no image at the start
    store: Store
    ledger: Ledger
    names: Mapping[int, str]  # of image files, by row index
    texts: TextCache | None
    work: Work
    outcome: Outcome
    batch_size: int
    kept: KeptPipeline | None
    reader: Reader | None = None  # of the pictures of the shard at hand
    exit_code: int = 1

    def shards(self) -> Iterator[Shard]:
        """The shards of this replica, until the run is asked to stop."""
        if self.drain.asked():
            return
        for shard in self.work.shards(self.drain):
            with contextlib.closing(Reader(shard.batches, self.spec.family, self.group)) as self.reader:
                yield shard
            if self.drain.stopped:
                return

    def batches(self, unreadable: Callable[[Sequence[tuple[Row, Reject]]], None]) -> Iterator[Batch]:
        """The batches of the shard at hand, with what their rows read of pictures, until the run is asked to stop.
        ``unreadable``: told of rows that are left out, as their pictures cannot be read."""
        assert self.reader is not None
        for batch, rejects in self.reader:
            if self.drain.asked():
                return
            if rejects:
                unreadable(rejects)
            if batch.rows:
                yield batch

    def generator(self) -> Generator:
        """What generates the images; to be used with ``with``."""
        store = self.store if self.job.profile and self.group.is_first else None
        return Generator(
            self.spec, self.rows, self.todo, self.batch_size, self.texts, self.work, self.report, store, self.kept
        )

    def writer(self) -> Output:
        """What writes the images; to be used with ``with``, within the generator's."""
        pages = None
        if self.job.output.gallery and self.group.is_first:
            title, alone, folders = self.job.run_name or "", self.work.alone, folders_of(self.job)
            counts = lambda: self.work.progress.counts  # noqa: E731
            pages = LivePages(self.store, self.ledger.images, title, counts, alone=alone, folders=folders)
        return Output(self.job, self.group, self.ledger, self.names, self.spec, self.work, self.report, pages)


@contextlib.contextmanager
def open_session(job: Job, kept: KeptPipeline | None = None) -> Iterator[Session]:
    """Open everything that can be wrong, before a weight is read; finish the run on leaving.

    Raises UserError for what is wrong with configuration, manifest, checkpoint or output.
    """
    replica = assignment.replica(job)
    backend.set_compiler_flags(job.hardware.xla_flags, job.hardware.libtpu_init_args)
    programs = cache.find("jax_cache_dir", job.jax_cache_dir)
    platform = backend.start(job.hardware.platform.name, programs.path, programs.writable)
    group = ProcessGroup()
    report = Report(quiet=not group.is_first)
    with drain_on_signals() as drain, contextlib.ExitStack() as until_end:
        with report.stage("open"), group.together():
            if programs.error:
                raise programs.error
            if STANDARD_INPUT in manifests(job) and (group.count > 1 or replica.count > 1):
                raise UserError(
                    f"manifest={STANDARD_INPUT}: expected a file: several processes cannot share standard input"
                )
            require_package(job.output.container)
            spec = open_model_spec(job, platform, group=group)
            given, bad_lines = read_rows(job, size_multiple=spec.size_multiple)
            store = open_location(job)
            digests = Digests(store, PICTURES)
            given, bad_lines = inspect(given, bad_lines, job.manifest_errors.name == "quarantine", digests)
            rows = spec.resolve(given)  # each row with its LoRA weights
            spec = spec.reading(rows)
            facts = {**spec.facts, **job.output.fingerprint()}
            start = group.start_id()
            with group.first_goes_first():
                if group.is_first:
                    until_end.enter_context(store.hold(LOCK, shared=replica.count > 1))
                ledger = Ledger(
                    store,
                    facts,
                    writer_id=f"{start}-{group.index}",
                    overwrite=job.overwrite,
                    container=job.output.container,
                )
                todo = ledger.remaining(rows, bad_lines, look=group.is_first)
                if group.is_first and replica.count == 1:
                    ledger.images.recover()
            cached = job.text_cache_dir is not None and job.text_cache_gigabytes
            alike = chain([replica, job.run_name, facts, cached], ((row.id, ledger.key(row)) for row in rows))
            group.agree("manifest or configuration", alike)
            todo = group.as_first_sees(todo, rows)
            names = ledger.names(todo, job.output.filename, EXTENSIONS[job.output.format.name])
            group.agree("ledger", names.items())
            texts = spec.text_cache(job.text_cache_dir, job.text_cache_gigabytes, todo)
            batch_size = job.sharding.per_device_batch_size * spec.data_parallel_size
            work = assignment.open_work(job, group, replica, store, ledger, start, rows, todo, batch_size)
            counted = {"rows": len(rows), "before": len(rows) - len(todo)}
            outcome = Outcome(job, group, spec, store, ledger, report, work, **counted)
            outcome.started()
            if group.is_first:
                digests.save()
                unlisted, lost = (
                    startup_warnings.unlisted(ledger.unlisted, job.overwrite),
                    startup_warnings.lost(ledger.lost),
                )
                for line in chain(lost, startup_warnings.lines(job, spec, given, rows, todo), unlisted):
                    report.say(line)
        drain.begin()
        until_end.enter_context(outcome.unforeseen())
        session = Session(
            job, group, drain, report, spec, rows, todo, store, ledger, names, texts, work, outcome, batch_size, kept
        )
        try:
            yield session
            session.exit_code = outcome.finished(Exit.PREEMPTED if drain.stopped else None)
        except (StorageError, TooManyFailures) as error:
            session.exit_code = outcome.stopped(error)
