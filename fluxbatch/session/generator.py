"""The run's side of the devices: shards and batches in, pixels out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax

from fluxbatch.generation import prompts
from fluxbatch.generation.kept import KeptPipeline
from fluxbatch.generation.model_spec import ModelSpec
from fluxbatch.generation.pipeline import Pipeline
from fluxbatch.generation.prompts import PromptEmbeds, TextCache
from fluxbatch.reporting.profiler import Trace
from fluxbatch.reporting.terminal import Report
from fluxbatch.shards import batching
from fluxbatch.shards.assignment import Work
from fluxbatch.storage.base import Store
from fluxbatch.types import Batch, Row, Shard


class Images(NamedTuple):
    """A batch on its way. Padding stands behind the rows."""

    pixels: jax.Array  # [B, H, W, 3] uint8
    finite: jax.Array  # [B]
    computed: jax.Array | None  # [B], steps that were computed; None: all
    seconds: Callable[[], float]  # the devices' time for it, once it is there


class Generator:
    """Begins with its first shard: a run that has nothing to do compiles and loads nothing."""

    def __init__(
        self,
        spec: ModelSpec,
        rows: Sequence[Row],
        todo: Sequence[Row],
        batch_size: int,
        texts: TextCache | None,
        work: Work,
        report: Report,
        profile: Store | None,
        kept: KeptPipeline | None,
    ):
        """``profile``: where a trace of two batches goes."""
        self._spec, self._rows, self._todo, self._batch_size = spec, rows, todo, batch_size
        self._texts, self._work, self._report, self._kept = texts, work, report, kept
        self._trace = Trace(profile, report.say)
        self._pipeline: Pipeline | None = None
        self._until_end = contextlib.ExitStack()

    def encode(self, shard: Shard) -> PromptEmbeds:
        """What the shard's distinct prompts encode to, on the host; then the text encoders make room."""
        pipeline = self._begun()
        embeds = prompts.encode(shard.rows, self._spec.inputs, pipeline, self._batch_size, self._texts)
        self._report.encoded(embeds)
        pipeline.encoders_out(again=self._spec.keep or not self._work.ends_with(shard))
        return embeds

    def denoise(self, batch: Batch, embeds: PromptEmbeds) -> jax.Array:
        """Latents ``[B, L, C]`` of a batch, launched and not waited for."""
        padded = batching.padded(batch.rows, batch.size)
        pictures = batch.pictures and [*batch.pictures, *[batch.pictures[-1]] * (batch.size - len(batch.rows))]
        return self._begun().denoise(padded, embeds.batch(padded), pictures or None)

    def decode(self, batch: Batch, latents: jax.Array) -> Images:
        """Their pixels, likewise."""
        pipeline = self._begun()
        pixels, finite = pipeline.decode(latents, *batch.shape)
        flops = sum(self._spec.flops(*batch.shape, row.steps, row.mode) for row in batch.rows)
        took = self._report.drawing(len(batch.rows), flops)
        self._trace.batch(pixels)
        return Images(pixels, finite, pipeline.computed, took.result)

    def _begun(self) -> Pipeline:
        if self._pipeline is None:
            self._pipeline = self._spec.pipeline(self._rows, self._report, self._kept)
            enter = self._until_end.enter_context
            enter(self._pipeline.compiling(self._todo, self._batch_size, self._spec.inputs))
            enter(self._report.generating(self._work.progress.rows, self._spec.peak))
            enter(self._trace)
        return self._pipeline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._until_end.__exit__(*error)
