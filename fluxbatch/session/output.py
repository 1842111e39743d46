"""The run's side of the output: batches in, files and records of this process's own images out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from fluxbatch.config.schema import Job
from fluxbatch.distributed.process_group import ProcessGroup
from fluxbatch.generation.model_spec import ModelSpec
from fluxbatch.generation.pictures import finish
from fluxbatch.reporting.terminal import Report
from fluxbatch.results.ledger import Ledger
from fluxbatch.results.live import LivePages
from fluxbatch.results.writer import Writer
from fluxbatch.session.generator import Images
from fluxbatch.shards.assignment import Work
from fluxbatch.types import Batch, Reject, Row, Shard


class Output:
    """Of a batch that several processes generate each writes the images of its own devices."""

    def __init__(
        self,
        job: Job,
        group: ProcessGroup,
        ledger: Ledger,
        names: Mapping[int, str],
        spec: ModelSpec,
        work: Work,
        report: Report,
        pages: LivePages | None,
    ):
        self._group, self._names, self._work, self._report, self._pages = group, names, work, report, pages
        self._progress = work.progress
        self._writer = Writer(
            ledger,
            job,
            facts=spec.provenance,
            roofline=spec.roofline_seconds,
            finish=lambda row, pixels: finish(row, pixels, spec.family),
            on_image=self._on_image,
        )

    def submit(self, batch: Batch, images: Images) -> None:
        """Hand over a batch, once the one before it is recorded. Raises what went wrong with an earlier one."""
        counts = [] if images.computed is None else [images.computed]
        own, (pixels, finite, *computed) = self._group.own(batch.rows, images.pixels, images.finite, *counts)
        if own:
            self._progress.beside(own[-1], len(batch.rows) - len(own))
            self._writer.put(own, self._names, pixels, finite, images.seconds, *computed)

    def reject(self, rejects: Sequence[tuple[Row, Reject]]) -> None:
        """Note rows that get no image. Raises what went wrong with an earlier batch."""
        if self._group.is_first:
            self._writer.reject(rejects)

    def commit(self, shard: Shard) -> None:
        """The records of a shard become one object, behind the devices, and the pages show some of its images."""
        pages = None if self._work.ends_with(shard) else self._pages  # the end writes whole ones
        self._writer.compact(pages.refresh if pages else None)

    def _on_image(self, row: Row, ok: bool) -> None:
        self._report.advance(self._progress.through(row, ok))

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._writer.__exit__(kind, *rest)
