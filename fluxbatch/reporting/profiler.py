"""``profile=true``: what hosts and devices did during two batches, as JAX traces it, beside the pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fluxbatch.storage.base import Store

BEFORE, TRACED = 1, 2  # batches; the first one warms up
FOLDER = "profile"  # then plugins/profile/<time>/, where TensorBoard and xprof look; Perfetto opens *.trace.json.gz


class Trace:
    """Context manager around a run; ``batch`` is told of each batch that was launched.

    ``store`` None: nothing is traced. ``say``: where a job too short for it is remarked on.
    """

    def __init__(self, store: Store | None, say: Callable[[str], None]):
        self._store, self._say = store, say
        self._seen = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def batch(self, outputs: Any) -> None:
        """The devices are waited for where the trace begins and ends, so that it holds whole batches."""
        if self._store is None:
            return
        self._seen += 1
        if self._seen == BEFORE:
            jax.block_until_ready(outputs)
            self._folder = tempfile.TemporaryDirectory(prefix="fluxbatch-profile-")
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would be most of the trace
            jax.profiler.start_trace(self._folder.name, profiler_options=options)
        elif self._seen == BEFORE + TRACED:
            jax.block_until_ready(outputs)
            self._stop()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._folder is not None:
            self._stop()
        if self._store is not None and kind is None and self._seen < BEFORE + TRACED:
            self._say(
                f"profile=true: {BEFORE} batch of {self._seen} warmed up: {max(0, self._seen - BEFORE)} traced, "
                f"{TRACED} wanted"
            )

    def _stop(self) -> None:
        assert self._folder is not None and self._store is not None
        jax.profiler.stop_trace()
        with self._folder as folder:
            self._folder = None
            for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                self._store.write(f"{FOLDER}/{file.relative_to(folder).as_posix()}", file.read_bytes())
