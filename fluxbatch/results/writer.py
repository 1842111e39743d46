"""Pixels → files → records, in threads behind the device. Nothing else in the program writes images.

A batch is copied back from the device, its images are encoded and written in parallel, and then
it is recorded. One batch at a time is on this way while the device makes the next: memory is
bounded, and a kill costs no more than what was not yet recorded of that one. Of images that are to lie
in shards a batch is one write, and batches that come while others are being written wait, to go together: a kill costs
these too, at most ``Images.together`` that wait and as many that are being written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from fluxbatch.config.schema import Job, Output
from fluxbatch.results.grouped import Grouped
from fluxbatch.results.image_files import INFOTEXT, OWN, cropped, encode, infotext, is_flat, pixel_sha256
from fluxbatch.results.ledger import Ledger, Record, utc_now
from fluxbatch.results.packer import Packer
from fluxbatch.results.resume import parameters, with_extra
from fluxbatch.storage.base import StorageError
from fluxbatch.types import Reject, Row

# By what a picture was made, in its record: decides how it is rounded, and no more
PROGRAM = ("fluxbatch_version", "jax_version", "device_kind", "device_count", "per_device_batch_size")

# What else in a record does not decide the pixels
_UNSTABLE = ("file_name", "shard", "index", "seed_text", "computed_steps", "seconds", "mfu", "created", "flags")

Outcome = Record | Reject | StorageError  # of a row: its record, its reject, or the error that ends the job

_ATTEMPTS = 3
_BACKOFF = 0.5  # seconds before the second attempt, doubled before the third


class TooManyFailures(Exception):
    """Rows failed and ``on_error=stop`` or ``max_failures`` says that this ends the job."""


def encoded(record: Record, pixels: np.ndarray, format: str, output: Output) -> bytes:
    """The image's file, which says of itself what decides the pixels and no more: the same image is the same file."""
    unstable = (*_UNSTABLE, *PROGRAM)
    stable = {key: value for key, value in record.items() if key not in unstable}
    names = list(record)
    own = {name: record[name] for name in names[: names.index("key") + 1]}  # a manifest's other fields decide nothing
    text = {INFOTEXT: infotext(own), OWN: json.dumps(stable, ensure_ascii=False), "Software": "fluxbatch"}
    return encode(pixels, format, text=text, png_level=output.png_level, quality=output.quality)


class Writer:
    """Context manager around one run; leaving it waits for everything that was put.

    ``facts``: what a record says besides its row and its file (model, digests, dtypes, …).
    ``roofline``: the least seconds a row's image takes on this process's devices, where that is known: its record then
    has the share of their peak (MFU) that it reached.
    ``finish``: the row's image of what was drawn for it; ValueError says why there is none.
    ``retry``: makes a row again that came out non-finite → (uint8 [H, W, 3], finite).
    ``on_image``: called once for every row, with whether it has its image now; from a thread.
    """

    def __init__(
        self,
        ledger: Ledger,
        job: Job,
        *,
        facts: Mapping[str, Any],
        roofline: Callable[[Row], float | None] = lambda row: None,
        finish: Callable[[Row, np.ndarray], np.ndarray] = lambda row, pixels: pixels,
        retry: Callable[[Row], tuple[np.ndarray, bool]] | None = None,
        on_image: Callable[[Row, bool], None] | None = None,
    ):
        self._ledger = ledger
        self._packer = Packer(ledger.images, job.output)
        self._behind = Grouped(self._guarded(self._record_batches), ledger.images.together)
        self._files: dict[str, bytes] = {}  # of the batch, by name
        self._output = job.output
        self._failures_that_end = 1 if job.on_error.name == "stop" else job.max_failures
        self._facts = dict(facts)
        self._roofline = roofline
        self._finish = finish
        self._retry = retry
        self._retrying = threading.Lock()  # it may need the device's memory: one row at a time
        self._on_image = on_image
        self._room = threading.Semaphore(1)
        self._batches = ThreadPoolExecutor(1, thread_name_prefix="batch")
        # compression takes a core each; on object storage threads mostly wait for the network
        self._images = ThreadPoolExecutor(max(16, os.cpu_count() or 1), thread_name_prefix="image")
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._begun = 0.0  # when the device could begin the batch at hand
        self.written = 0  # images recorded
        self.rejected = 0
        self.bytes = 0
        self.waited = 0.0  # seconds in ``put``: for the device, or for a writing that is slower

    def put(
        self,
        rows: Sequence[Row],
        names: Mapping[int, str],
        pixels: Any,
        finite: Any,
        seconds: Callable[[], float] | None = None,
        computed: Any = None,
    ) -> None:
        """Hands over one batch, once the one before it is recorded.

        ``pixels`` uint8 [B, H, W, 3] and ``finite`` bool [B], arrays that NumPy can copy back,
        B ≥ len(rows): what is beyond the rows is padding. ``names``: file name by row index.
        ``seconds``: the devices' time for the batch, asked for when its pixels are there; None: measured from batch to
        batch. ``computed`` [B]: how many of its steps each row computed; None: all. Raises what went wrong with an
        earlier batch, if that ends the job.
        """
        called = time.monotonic()
        self._room.acquire()
        self.waited += time.monotonic() - called
        if self._error:
            self._room.release()
            raise self._error
        self._begun = self._begun or called
        self._submit(self._write_batch, tuple(rows), names, pixels, finite, seconds, computed).add_done_callback(
            lambda _: self._room.release()
        )

    def reject(self, rejects: Sequence[tuple[Row, Reject]]) -> None:
        """Notes rows that get no image, behind the batches that were put; raises what went wrong with one of them."""
        if self._error:
            raise self._error
        self._submit(self._note, *zip(*rejects, strict=True))

    def compact(self, first: Callable[[], None] | None = None) -> None:
        """At the end of a shard: its records become one object, in the background, once its last batch is recorded.
        ``first``: called before that, in the thread that packs."""
        self._submit(self._behind.then, self._guarded(lambda: self._compact(first)))

    def close(self) -> None:
        """Waits until everything that was put is written and recorded.

        Raises what ended the job, if anything did.
        """
        self._finish_all()
        self._packer.close()
        if self._error:
            raise self._error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        self._finish_all()  # the first error stays
        with contextlib.suppress(Exception):
            self._packer.close()

    def _finish_all(self) -> None:
        """Wait for all that was put."""
        self._batches.shutdown()
        self._images.shutdown()
        self._behind.close()

    def _submit(self, task: Callable[..., None], *arguments: Any) -> Future[None]:
        return self._batches.submit(self._guarded(task), *arguments)

    def _guarded(self, task: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            try:
                task(*arguments)
            except BaseException as error:  # raised by the next put, or by close
                self._error = self._error or error

        return run

    def _write_batch(
        self,
        rows: Sequence[Row],
        names: Mapping[int, str],
        pixels: Any,
        finite: Any,
        seconds: Callable[[], float] | None,
        computed: Any,
    ) -> None:
        pixels = np.asarray(pixels)[: len(rows)]  # waits for the device
        finite = np.asarray(finite)[: len(rows)]
        now = time.monotonic()
        steps = [row.steps for row in rows] if computed is None else np.asarray(computed)[: len(rows)]
        share = (seconds() if seconds else now - self._begun) / len(rows)
        self._begun = now
        outcomes = list(
            self._images.map(
                lambda row, image, good, count: self._write_image(
                    row, names[row.index], image, bool(good), share, int(count)
                ),
                rows,
                pixels,
                finite,
                steps,
            )
        )
        files, self._files = self._files, {}
        self._behind.add((rows, outcomes, files))

    def _record_batches(self, batches: Sequence[tuple[Sequence[Row], Sequence[Outcome], Mapping[str, bytes]]]) -> None:
        rows = [row for batch, _, _ in batches for row in batch]
        outcomes = [outcome for _, found, _ in batches for outcome in found]
        files = {name: data for *_, images in batches for name, data in images.items()}
        try:
            self._attempt(self._ledger.images.write_together, files)
        except (StorageError, OSError) as error:
            failed = [self._failed(row, error) for row in rows]
            outcomes = [new if isinstance(old, dict) else old for old, new in zip(outcomes, failed, strict=True)]
        records = [outcome for outcome in outcomes if isinstance(outcome, dict)]
        rejects = [outcome for outcome in outcomes if isinstance(outcome, Reject)]
        fatal = next((outcome for outcome in outcomes if isinstance(outcome, StorageError)), None)
        self._attempt(self._ledger.commit, records)
        self._packer.add(records, {record["file_name"]: files[record["file_name"]] for record in records})
        self._attempt(self._ledger.reject, rejects)
        self._count(rows, outcomes)
        if fatal:
            raise fatal
        self._end_of_patience(rejects)

    def _note(self, rows: Sequence[Row], rejects: Sequence[Reject]) -> None:
        self._attempt(self._ledger.reject, rejects)
        self._count(rows, rejects)
        self._end_of_patience(rejects)

    def _end_of_patience(self, rejects: Sequence[Reject]) -> None:
        """TooManyFailures where these rejects are one more than the job may have."""
        if rejects and self._failures_that_end is not None and self.rejected >= self._failures_that_end:
            last = rejects[-1]
            raise TooManyFailures(f"{last.where}: {last.reason} (stopped after {self.rejected} failed rows, as asked)")

    def _compact(self, first: Callable[[], None] | None) -> None:
        if not self._error:  # else the shard is not whole
            if first:
                self._packer.then(first)
            self._packer.then(self._ledger.compact)  # what that makes known as done, others need not pack

    def _write_image(
        self, row: Row, name: str, pixels: np.ndarray, finite: bool, seconds: float, steps: int
    ) -> Outcome:
        try:
            if not finite and self._retry:
                with self._retrying:
                    pixels, finite = self._retry(row)
            if not finite:
                return self._reject(row, "the image is not finite (NaN or infinity)")
            try:
                pixels = self._finish(row, cropped(row, pixels))
            except ValueError as error:
                return self._reject(row, str(error))
            record = self._record(row, name, np.ascontiguousarray(pixels), seconds, steps)
            self._attempt(self._encode_and_write, record, pixels)
            return record
        except Exception as error:  # one image never costs the others
            return self._failed(row, error)

    def _failed(self, row: Row, error: Exception) -> Reject | StorageError:
        if isinstance(error, StorageError):
            return error if error.fatal else self._reject(row, str(error))
        return self._reject(row, f"{type(error).__name__}: {error}")

    def _encode_and_write(self, record: Record, pixels: np.ndarray) -> None:
        data = encoded(record, pixels, self._output.format.name, self._output)
        self._ledger.images.write(record["file_name"], data)
        with self._lock:
            self._files[record["file_name"]] = data
            self.bytes += len(data)

    def _record(self, row: Row, name: str, pixels: np.ndarray, seconds: float, steps: int) -> Record:
        roofline = self._roofline(dataclasses.replace(row, num_inference_steps=steps, strength=1.0))
        record = {
            "file_name": name,
            "id": row.id,
            "index": row.index,
            **parameters(row),
            **self._facts,
            "sha256": pixel_sha256(pixels),
            "computed_steps": steps,
            "seconds": round(seconds, 4),
            "mfu": float(f"{roofline / seconds:.3g}")
            if roofline and seconds
            else 0.0,  # which no picture reaches: not known
            "created": utc_now(),
            "flags": "flat" if is_flat(pixels) else "",
            "key": self._ledger.key(row),  # the last of our own, which tells them from the row's
        }
        return with_extra(record, row)

    def _reject(self, row: Row, reason: str) -> Reject:
        return Reject(row.where, reason, row.id, row.index)

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Tries again what may pass: not a full disk, and not a missing permission."""
        for attempt in range(_ATTEMPTS):
            try:
                return action(*arguments)
            except (StorageError, OSError) as error:
                if getattr(error, "fatal", False) or attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(_BACKOFF * 2**attempt)

    def _count(self, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
        with self._lock:
            for row, outcome in zip(rows, outcomes, strict=True):
                self.written += isinstance(outcome, dict)
                self.rejected += isinstance(outcome, Reject)
                if self._on_image and not isinstance(outcome, StorageError):
                    self._on_image(row, isinstance(outcome, dict))
