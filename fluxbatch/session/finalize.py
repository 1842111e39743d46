"""The end of a run: merged metadata, gallery, status, summary and exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml
from omegaconf import OmegaConf

from fluxbatch.config.schema import Container, Job
from fluxbatch.distributed.process_group import LOST, ProcessGroup
from fluxbatch.generation.model_spec import ModelSpec
from fluxbatch.reporting.terminal import Report
from fluxbatch.results import packer
from fluxbatch.results.card import write_card
from fluxbatch.results.contact_sheet import write_contact_sheet
from fluxbatch.results.gallery import write_gallery, write_grid
from fluxbatch.results.inputs import folders_of
from fluxbatch.results.ledger import Ledger, Tally
from fluxbatch.results.location import CONFIG, JOB, METADATA, REJECTS, SHEET
from fluxbatch.shards.assignment import Work
from fluxbatch.storage.base import StorageError, Store, join
from fluxbatch.storage.registry import open_store, open_stream
from fluxbatch.types import Exit, UserError

REASONS = {
    Exit.OK: "every row has its image",
    Exit.REJECTED_ROWS: "finished; some rows were rejected, see rejects.jsonl",
    Exit.PEER_LOST: LOST,
    Exit.PREEMPTED: "stopped before every row had its image: run the same command again",
}


@dataclasses.dataclass
class Outcome:
    """What there is to say about a run once it is over, however it ended."""

    job: Job
    group: ProcessGroup
    spec: ModelSpec
    store: Store
    ledger: Ledger
    report: Report
    work: Work
    rows: int  # of the manifest, bad lines not counted
    before: int  # of these, done when it started

    def started(self) -> None:
        """Leaves the resolved configuration with the output, for whoever finds it there later."""
        if not self.group.is_first:
            return
        self.store.write(CONFIG, self._config())
        self.work.started()

    @contextlib.contextmanager
    def unforeseen(self) -> Iterator[None]:
        """Leaves word of an error that nobody expected, and lets it pass; memory that does not suffice is a mistake of
        the user's."""
        try:
            yield
        except Exception as error:
            if self.group.is_loss(error):
                self._lost_a_peer(error)
            mistake = self._too_large() if "RESOURCE_EXHAUSTED" in str(error) else error
            code, reason = 1, f"{type(error).__name__}: {error}"[:500]
            if isinstance(mistake, UserError):
                mistake.code = code = 1 if self.ledger.committed else Exit.BAD_INPUT
                reason = str(mistake)
            self._cut_off(code, reason)
            if mistake is error:
                raise
            raise mistake from error

    def _too_large(self) -> UserError:
        size = self.job.sharding.per_device_batch_size
        smaller = "a smaller batch or resolution" if size > 1 else "a smaller resolution"
        wanted = f"{smaller}, sharding=fsdp, offload_encoders=true, or stream_blocks=true"
        return UserError(f"sharding.per_device_batch_size={size}: the device's memory does not hold it: {wanted}")

    def _cut_off(self, code: int, reason: str) -> None:
        """Merges what is recorded and leaves the status, each as far as the place allows: the error that ended the run
        is the one to tell of."""
        counts = self.work.progress.counts
        if self.work.merges and self.group.is_first:
            with contextlib.suppress(Exception):
                counts = self._counts(self.ledger.merge())
        with contextlib.suppress(StorageError):
            self.work.ended(code, reason, counts, **self.report.measured())

    def _lost_a_peer(self, error: Exception) -> NoReturn:
        """What this process has made is recorded; a regular exit would wait for the peer that is gone."""
        with contextlib.suppress(StorageError):
            self.work.ended(Exit.PEER_LOST, REASONS[Exit.PEER_LOST], self.work.progress.counts)
        self.group.lost(error)

    def finished(self, cut: Exit | None) -> int:
        """All batches are through, or the run was drained (``cut``). The first process of a replica speaks
        for all, once all have recorded what they made; if it fails, all end as it does."""
        self.group.meet()
        code = 1
        try:
            if self.group.is_first:
                code = self._finished(cut)
        except StorageError as error:
            code = self._failed(error)
        finally:
            code = self.group.first_says(code)
        return code

    def _finished(self, cut: Exit | None) -> int:
        if not self.work.merges:
            return self._left_to_others(cut)
        with self.report.stage("finish"):
            if cut is None:  # else the next start goes on where this one stops
                packer.finish(self.ledger.images, self.ledger.records, self.job.output)
            tally = self.ledger.merge()
            code = Exit.PREEMPTED if tally.left else Exit.REJECTED_ROWS if tally.rejects else Exit.OK
            counts = self._counts(tally)
        own = None if self.work.alone else self.work.progress.made
        pages = []
        if self.job.output.gallery and cut is None:  # a machine that is taken away does not wait for pages
            title = self.job.run_name or ""
            with self.report.stage("pages"):
                rejects = self._lines(REJECTS) if tally.rejects else ()
                images = self.ledger.images
                figures = self.report.figures(counts, own)
                in_shards = images if self.job.output.container is not Container.files else None
                folders = folders_of(self.job)
                write_gallery(self.store, self._lines(METADATA), rejects, title, figures, in_shards, folders)
                write_contact_sheet(self.store, images, self._lines(METADATA), title=title, folders=folders)
                pages.append(f"look at    {join(self.store.url, 'index.html')} or {join(self.store.url, SHEET)}")
                if self.job.sweep:
                    pages.append(f"the sweep  {_write_grid(self.job)}")
        if tally.done and cut is None:
            license = self.spec.license(self.job.model)
            write_card(self.store, self.job, {"images": tally.done, "rejected": len(tally.rejects)}, license)
        self.work.ended(code, REASONS[code], counts, **self.report.measured())
        self.report.summary(counts, join(self.store.url, METADATA), own)
        for line in pages:
            print(line)
        if code != Exit.OK:
            self.report.say(REASONS[code])
        return code

    def stopped(self, error: Exception) -> int:
        """The output place failed or too many rows did; what was written stays and counts."""
        code = self._failed(error)
        self.group.leave(code)
        return code

    def _failed(self, error: Exception) -> int:
        self.report.say(f"error: {error}", aloud=True)
        self._cut_off(1, str(error))
        return 1

    def _left_to_others(self, cut: Exit | None) -> int:
        """The end of a replica while others go on, or after another has merged."""
        code = cut or (Exit.REJECTED_ROWS if self.store.exists(REJECTS) else Exit.OK)
        own = self.work.progress.counts
        counts = own | {"rows": self.rows, "made": self.rows - own["before"] - own["rejected"]}
        others = "left to others" if cut else "made or rejected by others"
        self.report.summary(counts, join(self.store.url, METADATA), own["made"], others)
        self.work.ended(code, REASONS[code], self.work.progress.counts, **self.report.measured())
        self.report.say(REASONS[code] if cut else f"{REASONS[code]}; another replica has merged the metadata")
        return code

    def _counts(self, tally: Tally) -> dict[str, int]:
        made = max(0, tally.done - self.before)
        return {
            "rows": tally.rows,
            "made": made,
            "before": self.before,
            "rejected": len(tally.rejects),
            "left": tally.left,
        }

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        with open_stream(join(self.store.url, name)) as stream:
            yield from map(json.loads, stream)

    def _config(self) -> bytes:
        """The resolved configuration, and what the checkpoint made of it."""
        job = OmegaConf.to_container(OmegaConf.structured(self.job), enum_to_str=True)
        assert isinstance(job, dict)
        resolved = job | {"resolved": self.spec.facts, "lora_coverage": self.spec.lora.coverage()}
        return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def _write_grid(job: Job) -> str:
    """The page of a multirun, rewritten as its jobs finish: what each one varied is in its config."""
    assert job.run_name is not None
    root = open_store(join(job.output_dir, *job.run_name.split("/")[:-1]))
    jobs, begun = {}, set()  # what is somebody else's has no ledger, which is listed before the configuration
    for name in root.list():
        folder, _, file = name.partition("/")
        if file == JOB:
            begun.add(folder)
        if file == CONFIG and folder in begun:
            jobs[folder] = yaml.safe_load(root.read(name)).get("sweep") or {}
    in_order = dict(sorted(jobs.items(), key=lambda item: (len(item[0]), item[0])))
    write_grid(root, in_order, job.run_name.split("/")[-2], folders_of(job))
    return join(root.url, "index.html")
