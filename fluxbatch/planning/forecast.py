"""What a plan says, line by line: figures that are exact, and estimates that say so."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp

from fluxbatch.config.schema import Job, shown
from fluxbatch.distributed.chips import GPU_SHARES, Target, gpu_share
from fluxbatch.generation.model_spec import ModelSpec
from fluxbatch.models.family import padded_to
from fluxbatch.planning import aot, memory
from fluxbatch.reporting import columns, startup_warnings
from fluxbatch.results.resume import left_out
from fluxbatch.shards import batching
from fluxbatch.types import Batch, Mode, Reject, Row, Shard
from fluxbatch.weights import device_weights, load

TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Work:
    """Rows as the batches that will be generated."""

    spec: ModelSpec
    shards: Sequence[Shard]
    size: int  # images of a batch

    @classmethod
    def of(cls, job: Job, spec: ModelSpec, rows: Sequence[Row]) -> Work:
        """As ``assignment`` makes them of a whole manifest."""
        size = job.sharding.per_device_batch_size * spec.data_parallel_size
        if (job.replica_count or 1) == 1:
            shards = batching.plan(rows, size, job.shard_size)
        else:
            work_units = batching.work_units(rows, size, job.shard_size)
            shards = [Shard(i, tuple(batching.batches(work_unit, size))) for i, work_unit in enumerate(work_units)]
        return cls(spec, shards, size)

    @functools.cached_property
    def batches(self) -> list[Batch]:
        return [batch for shard in self.shards for batch in shard.batches]

    @functools.cached_property
    def buckets(self) -> dict[memory.Size, list[Batch]]:
        """Batches by image size and mode."""
        found: dict[memory.Size, list[Batch]] = {}
        for batch in self.batches:
            found.setdefault((*batch.shape, batch.mode), []).append(batch)
        return found

    def generated(self, batches: Sequence[Batch]) -> int:
        """FLOPs of these batches, what fills them up included: a batch takes as many steps as its longest row."""
        return self.size * self._flops(
            (*batch.shape, max(row.steps for row in batch.rows), batch.mode) for batch in batches
        )

    def asked(self, batches: Sequence[Batch]) -> int:
        """FLOPs of the rows alone."""
        return self._flops((row.height, row.width, row.steps, row.mode) for batch in batches for row in batch.rows)

    def _flops(self, images: Iterable[tuple[int, int, int, Mode]]) -> int:
        """Of heights, widths and steps: of few different ones."""
        return sum(count * self.spec.flops(*image) for image, count in collections.Counter(images).items())

    def encoded(self) -> int:
        """FLOPs of encoding each shard's distinct prompts, in whole batches of one length."""
        family, inputs = self.spec.family, self.spec.inputs
        return sum(
            -(-count // self.size) * self.size * family.encode_flops(padded_to(inputs, lengths))
            for shard in self.shards
            for lengths, count in self.spec.distinct(shard.rows).items()
        )

    @property
    def text_lengths(self) -> int:
        """How many lengths prompts are padded to."""
        return len({lengths for *_, mode in self.buckets for lengths in mode.texts or [()]})


def lines(
    job: Job,
    spec: ModelSpec,
    target: Target,
    rows: Sequence[Row],
    todo: Sequence[Row],
    rejects: Sequence[Reject],
    price: float | None,
    ahead: bool,
) -> Iterator[str]:
    """The whole plan; ``todo``: those of the rows that have no image; ``ahead``: with what the compiler says of the
    largest image."""
    work = Work.of(job, spec, todo)
    yield from _rows(job, spec, rows, rejects)
    if len(todo) < len(rows):
        done = len(rows) - len(todo)
        yield _line("done", f"{done:,} of them have their image; what follows is of the {len(todo):,} to make")
    yield from _model(job, spec, target, rows)
    if todo:
        yield from _batches(work)
        yield from _text(spec, todo)
        yield from _lora(spec)
        yield from _memory(job, spec, target, work)
        yield from _reads(job, spec, target, work)
        yield from _cost(job, spec, target, work, price)
        if ahead:
            yield from _compiled(job, spec, target, work)


def _rows(job: Job, spec: ModelSpec, rows: Sequence[Row], rejects: Sequence[Reject]) -> Iterator[str]:
    distinct = sum(spec.distinct(rows).values())
    yield _line("rows", f"{len(rows):,} of {shown(job.manifest or job.prompt)}, {distinct:,} distinct prompts")
    if rejects:
        where = startup_warnings.some([reject.where.rpartition("/")[2] for reject in rejects])
        yield _line("rejects", f"{len(rejects):,} bad lines are set aside: {where}")
    if fields := startup_warnings.unread(rows):
        yield _line("warning", fields)
    yield from (_line("warning", warning) for warning in startup_warnings.odd(rows))


def _model(job: Job, spec: ModelSpec, target: Target, rows: Sequence[Row]) -> Iterator[str]:
    counts = ", ".join(
        f"{part} {_scaled(memory.parameters(spec, part), 1000, ('', 'k', 'M', 'G'))}" for part in spec.plans
    )
    name = f"{job.model.flux_name}: {shown(job.model.pretrained_model_name_or_path)}"
    yield _line("model", f"{name}; parameters: {counts}; {spec.weights_dtype}")
    mesh = " × ".join(f"{axis} {size}" for axis, size in spec.mesh.shape.items() if size > 1) or "one device"
    if (idle := target.chips - spec.mesh.size) > 0:
        mesh += f", {idle} idle (sharding=ddp or fsdp takes all)"
    replicas = f", {job.replica_count} replicas of it" if (job.replica_count or 1) > 1 else ""
    yield _line("machine", f"{target}; {mesh}{replicas}")
    unseen = filter(None, [spec.checkpoint.unseen])
    swept = startup_warnings.overridden(job.sweep, rows)
    unread = (*startup_warnings.unguided(spec, rows), *startup_warnings.unread_texts(spec, rows))
    warnings = (*unseen, *spec.warnings, *unread, *swept, *left_out(rows, spec.provenance), *columns.lines(rows))
    for warning in warnings:
        yield _line("warning", warning)


def _batches(work: Work) -> Iterator[str]:
    name = "buckets"
    for (height, width, mode), batches in work.buckets.items():
        count = sum(len(batch.rows) for batch in batches)
        steps = sorted({row.steps for batch in batches for row in batch.rows})
        waste = 1 - work.asked(batches) / work.generated(batches)
        span = f"{steps[0]}–{steps[-1]}" if len(steps) > 1 else str(steps[0])
        rows = f"{count:,} rows in {len(batches):,} batches of {work.size}, {waste:.1%} padding"
        yield _line(name, f"{height}×{width}{mode}, {span} steps: {rows}")
        name = ""
    # of images, and of token sequences
    sizes = len({(height, width) for height, width, _ in work.buckets})
    lengths = len({(height * width, mode) for height, width, mode in work.buckets})
    texts = work.text_lengths
    twice = f"{texts} × text, {texts} × modulation" if texts > 1 else "text, modulation"
    kinds = f"{twice}, {lengths} × denoising, {sizes} × decoding"
    yield _line("programs", f"{2 * texts + lengths + sizes} to compile: {kinds}; {len(work.shards):,} shards")


def _text(spec: ModelSpec, rows: Sequence[Row]) -> Iterator[str]:
    for i, (reads, cut) in enumerate(startup_warnings.truncated(spec.inputs, rows)):
        yield _line("" if i else "text", f"{reads}: {cut or 'no prompt is cut'}")


def _lora(spec: ModelSpec) -> Iterator[str]:
    for i, line in enumerate(spec.lora.table()):
        yield _line("" if i else "lora", line)


def _memory(job: Job, spec: ModelSpec, target: Target, work: Work) -> Iterator[str]:
    limit = target.chip.limit if target.chip else device_weights.host_memory() // spec.mesh.size
    again, devices = len(work.shards) > 1, jax.devices()[: target.chips]
    situation = memory.Situation.of(job, spec, target.platform, list(work.buckets), again, limit, devices)
    if len(spec.lora.distinct(row for batch in work.batches for row in batch.rows)) > 1:  # adapters are not merged
        situation = dataclasses.replace(situation, beside=memory.adapters(spec))
    phases = situation.phases()
    for i, phase in enumerate(phases):
        terms = f"{_bytes(phase.weights)} weights + about {_bytes(phase.activations)}"
        yield _line("" if i else "memory", f"{phase.name:8} {terms} = {_bytes(phase.total)} a device")
    worst = max(phases, key=lambda phase: phase.total)
    verdict = f"{_bytes(limit)} a device: {'fits' if worst.total <= limit else f'{worst.name} does not fit'} (estimate)"
    if target.platform == "gpu":
        verdict += f"; fluxbatch takes {gpu_share():.0%} of a GPU, unless {GPU_SHARES[0]} says otherwise"
    if again and situation.takes_turns:
        verdict += "; the transformer and the text encoders do not fit together, and take turns for every shard"
    yield _line("", verdict)
    if worst.total > limit:
        exact, other = situation.remedy(limit), situation.inexact_remedy(limit)
        if exact:
            slow = ", which is slow" if memory.STREAM in exact else ""
            yield _line("", f"fits with {' '.join(exact)}: the same images{slow}")
        if other and (not exact or memory.STREAM in exact):
            yield _line("", f"fits with {' '.join(other)}: slightly other images (jobs/docs/speed.md says how much)")
        if not (exact or other):
            yield _line("", "nothing here makes it fit: smaller images, or more or larger devices")


def _compiled(job: Job, spec: ModelSpec, target: Target, work: Work) -> Iterator[str]:
    height, width, mode = max(work.buckets, key=functools.partial(memory.tokens, spec))
    needs: Iterable[aot.Need]
    if target.topology:
        needs = aot.compiled(job, target, height, width, mode)
    else:
        needs = aot.needs(spec, work.size, height, width, mode, ("denoise", "decode"))
    for need in needs:
        terms = f"{_bytes(need.held)} weights + {_bytes(need.more)}, of it temporary {_bytes(need.temporaries)}"
        text = f"{need.name:8} {need.fault or terms}; {_time(need.seconds)} for {height}×{width}"
        yield _line("compiled" if need.name == "denoise" else "", text)


def _reads(job: Job, spec: ModelSpec, target: Target, work: Work) -> Iterator[str]:
    lora_weights = spec.lora.distinct(row for batch in work.batches for row in batch.rows)
    each = spec.mesh.size // target.hosts
    hosts = [set(spec.mesh.devices.flat[i * each : (i + 1) * each]) for i in range(target.hosts)]
    read = {}
    for part, plan in spec.plans.items():
        edits = spec.lora.edits(part, lora_weights[0]) if len(lora_weights) == 1 else {}
        read[part] = max(load.to_read(plan, spec.mesh, edits, devices=devices) for devices in hosts)
    again = ""
    if job.hardware.offload_encoders == "free" and len(work.shards) > 1:
        encoders = _bytes(sum(read[part] for part in spec.family.encoders))
        again = f", and {encoders} of text encoders again for each of {len(work.shards):,} shards"
    if spec.stream:
        steps = sum(max(row.steps for row in batch.rows) for batch in work.batches)
        again += f", and the transformer's blocks for each of {steps:,} steps (from memory as long as it holds them)"
    a_host = " a host" if target.hosts > 1 else ""
    yield _line("reads", f"{_bytes(sum(read.values()))} of weights{a_host}{again}")


def _cost(job: Job, spec: ModelSpec, target: Target, work: Work, price: float | None) -> Iterator[str]:
    images, replicas = sum(len(batch.rows) for batch in work.batches), job.replica_count or 1
    total = work.generated(work.batches) + work.encoded()
    alone = f"{_flops(work.asked(work.batches) / images)} of it for the image alone"
    yield _line("work", f"{_flops(total)}, {_flops(total / images)} an image; {alone}")
    peak, reached, source = _speed(spec, target)
    if peak is None:
        yield _line("time", f"no estimate: {source}")
        return
    chips, rented = (size * replicas for size in (spec.mesh.size, max(spec.mesh.size, target.chips)))
    roofline = total / (peak * TERA * chips)
    expected = roofline / reached
    about = f"about {_time(expected)} at {reached:.0%} of it, {images / expected:.3g} images/s"
    yield _line("time", f"{_time(roofline)} at least ({source}); {about}, besides loading and compiling (estimate)")
    if price is not None:
        hours = expected / 3600
        yield _line("cost", f"about {rented * hours * price:,.2f}: {rented} × {hours:,.2f} h × {price:g} (estimate)")


def _speed(spec: ModelSpec, target: Target) -> tuple[float | None, float, str]:
    """TFLOP/s of a chip, the share that may be expected, and where the first is from."""
    if target.platform == "cpu":
        rate = _matmul() / spec.mesh.size
        return rate, 0.5, f"matrix products run at {rate * spec.mesh.size:.2f} TFLOP/s here and now"
    if target.chip is None:
        return None, 0.0, f"{target.name} is not in the table of chips"
    if spec.activations_dtype == "float32":
        return None, 0.0, "the table has bfloat16's peak, activations are float32"
    return target.chip.peak, target.chip.reached, f"at the peak of {target.chip.peak:g} TFLOP/s"


def _matmul(width: int = 1024) -> float:
    """TFLOP/s of a float32 matrix product on this machine, best of five."""
    x = jnp.ones((width, width))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * width**3 / seconds / TERA


def _line(name: str, text: str) -> str:
    return f"{name:9} {text}"


def _flops(number: float) -> str:
    return _scaled(number, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    power = min(int(math.log(max(number, 1), base)), len(units) - 1)
    scaled = number / base**power
    return f"{scaled:.3g} {units[power]}" if scaled < 1000 else f"{scaled:,.0f} {units[power]}"


def _time(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"


def _bytes(number: float) -> str:
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
