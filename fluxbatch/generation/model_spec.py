"""A job's model, opened (headers, digest: cheap) and then loaded (weights on devices)."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxbatch import __version__
from fluxbatch.config.schema import Job, Model
from fluxbatch.distributed import chips
from fluxbatch.distributed.mesh import Layout, data_parallel_size_of, open_mesh
from fluxbatch.distributed.process_group import ProcessGroup
from fluxbatch.generation import prompts
from fluxbatch.generation.components import open_parts
from fluxbatch.generation.kept import KeptPipeline
from fluxbatch.generation.observer import ProgressObserver
from fluxbatch.generation.pipeline import Pipeline
from fluxbatch.generation.prompts import TextCache
from fluxbatch.generation.resolve import resolved
from fluxbatch.generation.tokenizers import Absent, Tokenizer
from fluxbatch.lora.apply import Loras
from fluxbatch.models import attention
from fluxbatch.models.autoencoder import TPU_BANDS
from fluxbatch.models.family import Family, TextInput, inputs_of, padded_to
from fluxbatch.models.schedulers import Scheduler
from fluxbatch.storage import cache
from fluxbatch.types import PLAIN, Mode, Row, UserError, public
from fluxbatch.weights import device_weights, load
from fluxbatch.weights.block_streaming import StreamedWeights
from fluxbatch.weights.checkpoint import Checkpoint, open_checkpoint
from fluxbatch.weights.device_weights import DeviceWeights
from fluxbatch.weights.precision import Precision
from fluxbatch.weights.published import license_of


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything about the model that can be known, and be wrong, before a weight is read."""

    checkpoint: Checkpoint
    family: Family  # the checkpoint's, or what an adapter makes of it
    plans: Mapping[str, load.Plan]
    inputs: tuple[TextInput, ...]  # what the text encoders read of a row
    scheduler: Scheduler
    mesh: jax.sharding.Mesh
    weights_dtype: str
    activations_dtype: str
    products: bool  # whether the denoiser multiplies in eight bits
    cache_threshold: float | None  # of the step cache, if there is one
    stream: bool  # whether the transformer's blocks pass through the devices one at a time
    encoder_offload: str  # where the text encoders are while images are made
    denoiser_offload: str  # where the transformer is while text is encoded, which it is kept for if both fit
    facts: Mapping[str, Any]  # what decides the pixels besides the row
    provenance: Mapping[str, Any]  # what every image's record says of the model and of what runs it
    lora: Loras
    open_encoder: Callable[[], load.Plan]  # the decoder's plan, with what encodes pictures beside it
    identity: tuple[Any, ...]  # two engines that agree in it load the same weights and programs
    warnings: tuple[str, ...]  # what is allowed and probably not meant
    keep: bool  # whether the next job of this process may want the weights: one of a sweep
    group: ProcessGroup

    @property
    def data_parallel_size(self) -> int:
        """How many devices, or groups of devices that make the same images, a batch is dealt over."""
        return data_parallel_size_of(self.mesh)

    def precision(self, part: str) -> Precision:
        """What a component is held as."""
        return _precision(self.family, part, self.weights_dtype, self.activations_dtype, self.products)

    @property
    def size_multiple(self) -> int:
        """Heights and widths must be multiples of this many pixels."""
        return self.family.size_multiple

    @property
    def peak(self) -> float | None:
        """Dense bfloat16 FLOP/s of all devices together; None where it is not known, or does not apply."""
        chip = chips.of_kind(self.mesh.devices.flat[0].device_kind)
        return chip.peak * 1e12 * self.mesh.size if chip and self.activations_dtype != "float32" else None

    @staticmethod
    def license(model: Model) -> str | None:
        """What the model may be used under, as its page names it; None where that is not known."""
        return license_of(model.pretrained_model_name_or_path)

    def flops(self, height: int, width: int, steps: int, mode: Mode = PLAIN) -> int:
        """Floating-point operations from noise to picture."""
        evaluations = (self.family.step_flops(height, width, each, mode) for each in inputs_of(self.inputs, mode))
        return steps * sum(evaluations) + self.family.decode_flops(height, width)

    def roofline_seconds(self, row: Row) -> float | None:
        """Seconds that this process's devices would take for the row's image at their peak; None where that is not
        known."""
        if self.peak is None:
            return None
        share = len(self.mesh.local_devices) / self.mesh.size
        return self.flops(row.height, row.width, row.steps, row.mode) / (self.peak * share)

    def resolve(self, rows: Sequence[Row]) -> list[Row]:
        """The rows as the checkpoint understands them, each with its mode and its LoRA weights; UserError for fields
        that it has no use for, and for rows that cannot be in one job."""
        return resolved(rows, self.family, self.inputs, self.lora, self.stream, self.cache_threshold is not None)

    def reading(self, rows: Sequence[Row]) -> ModelSpec:
        """With what encodes pictures, if ``rows`` (resolved) have any."""
        return self.with_encoder() if any(row.mode.reads_pictures for row in rows) else self

    def with_encoder(self) -> ModelSpec:
        plans = {**self.plans, self.family.decoder: self.open_encoder()}
        return dataclasses.replace(self, plans=plans, identity=(*self.identity, "pictures"))

    def pipeline(
        self,
        rows: Sequence[Row] = (),
        observer: ProgressObserver = ProgressObserver(),
        kept: KeptPipeline | None = None,
    ) -> Pipeline:
        """What draws ``rows`` (resolved); weights stream onto the mesh as they are first needed, under the
        eyes of ``watcher``.

        Adapters are merged into the weights if all rows have the same LoRA weights, else they stand beside them.
        Weights that ``kept`` has of a job before stay, but for what adapters change.
        """
        lora_weights = self.lora.distinct(rows) or [self.lora.own]
        beside = self.lora if len(lora_weights) > 1 else None
        identity = (self.identity, beside and tuple(beside.fingerprint.items()))
        edits = {name: {} if beside else self.lora.edits(name, lora_weights[0]) for name in self.plans}
        tag = None if beside else tuple((self.lora.fingerprint[name], scale) for name, scale in lora_weights[0])
        kept = kept or KeptPipeline()
        if (pipeline := kept.take(identity)) is not None:
            pipeline.reuse(self.scheduler, observer, self.cache_threshold)
            for name, network in pipeline.networks.items() if kept.tag != tag else ():
                network.merge(edits[name])
        else:
            networks = {name: self._network(name, edits[name], beside) for name in self.plans}
            pipeline = Pipeline(
                self.family,
                networks,
                self.mesh,
                self.activations_dtype,
                self.scheduler,
                observer,
                beside,
                self.group,
                self.cache_threshold,
            )
        if self.keep:
            kept.put(identity, pipeline, tag)
        return pipeline

    def text_cache(self, folder: str | None, gigabytes: float, rows: Sequence[Row]) -> TextCache | None:
        """The cache of encoded prompts in ``folder``; None also where all of ``rows``' would not fit into it, as then
        none would be there when it is wanted again, or where a process cannot use the default."""
        if folder is None or self.text_bytes(rows) > gigabytes * 1e9:
            return None
        place = cache.find("text_cache_dir", folder)
        if place.error:
            raise place.error
        if not self.group.all_say(place.path is not None):
            return None
        entries = cache.Cache(place.path or "", int(gigabytes * 1e9))
        device = self.mesh.devices.flat[0].device_kind
        program = (
            __version__,
            jax.__version__,
            device,
            *self.mesh.shape.items(),
            self.weights_dtype,
            self.activations_dtype,
        )
        facts = (self.checkpoint.text_digest(), *program)
        return TextCache(
            entries,
            lambda row: (
                facts,
                tuple((self.lora.fingerprint[name], scale) for name, scale in self.lora.text_weights(row)),
            ),
        )

    def text_bytes(self, rows: Sequence[Row]) -> int:
        """About what the prompts of ``rows`` encode to."""
        itemsize = jnp.dtype(self.activations_dtype).itemsize
        numbers = 0
        for lengths, count in self.distinct(rows).items():
            shapes = self.family.conditioning_shapes(padded_to(self.inputs, lengths))
            numbers += count * sum(map(math.prod, shapes))
        return itemsize * numbers

    def distinct(self, rows: Sequence[Row]) -> dict[tuple[int, ...], int]:
        """How many different texts ``rows`` have the encoders read, by the lengths that they are padded to."""
        found = {each for row in rows for each in prompts.read_of(self.inputs, row)}
        return dict(collections.Counter(lengths for _, lengths in found))

    def _network(self, part: str, edits: load.Edits, beside: Loras | None) -> DeviceWeights:
        plan, dtype = self.plans[part], self.precision(part)
        if self.stream and part == self.family.denoiser:
            hold = device_weights.pinned(self.mesh) and device_weights.room(
                load.held(plan, self.mesh, dtype), self.group
            )
            return StreamedWeights(plan, self.mesh, dtype, edits, hold)

        def attach(module: nnx.Module) -> None:
            if beside is not None:
                beside.attach(part, module, plan, self.mesh, dtype.rest)

        away = (
            self.encoder_offload
            if part in self.family.encoders
            else self.denoiser_offload
            if part == self.family.denoiser
            else "keep"
        )
        return DeviceWeights(plan, self.mesh, dtype, edits, away, attach)


def open_model_spec(
    job: Job, platform: str, devices: Sequence[jax.Device] | None = None, processes: int | None = None,
    opened: Callable[[Model], Checkpoint] = open_checkpoint, group: ProcessGroup = ProcessGroup(),
) -> ModelSpec:  # fmt: skip
    """Opens the checkpoint and checks it against the job; UserError for anything that cannot work. ``devices``:
    those to use instead of all, as if they belonged to so many ``processes``. ``opened``: how a plan opens it."""
    processes = processes or jax.process_count()
    hardware, sampler, sharding = job.hardware, job.sampler, job.sharding
    default = "float32" if platform == "cpu" else "bfloat16"
    matmul = hardware.matmul_dtype and hardware.matmul_dtype.name
    weights = (matmul or default) if hardware.weights_dtype.name == "auto" else hardware.weights_dtype.name
    activations = default if hardware.activations_dtype.name == "auto" else hardware.activations_dtype.name
    try:
        inner = (
            sharding.ici_data_parallelism,
            sharding.ici_fsdp_parallelism,
            sharding.ici_context_parallelism,
            sharding.ici_tensor_parallelism,
        )
        mesh = open_mesh(inner, (sharding.dcn_data_parallelism, sharding.dcn_fsdp_parallelism), devices, processes)
        attend = attention.by_name(
            hardware.attention.name, platform, activations, hardware.flash_block_sizes, mesh.devices.flat[0].device_kind
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    checkpoint = opened(job.model)
    family = checkpoint.family
    tensor, heads = mesh.shape["tensor"], family.heads
    if heads % tensor:
        raise UserError(
            f"sharding.ici_tensor_parallelism={tensor}: expected a divisor of the transformer's {heads} attention heads"
        )
    layout = Layout(mesh if mesh.size > 1 else None)
    options = family.options(layout.attention(attend), hardware.split_head_dim, TPU_BANDS if platform == "tpu" else 1)
    parts = open_parts(job, checkpoint, layout, options)
    family = parts.family
    opening = {name: files.open or Tokenizer for name, files in family.tokenizers.items()}
    tokenizers: dict[str, Any] = {  # a plan's stand-in is never called
        name: opening[name](folder) if folder else Absent() for name, folder in checkpoint.tokenizers.items()
    }
    inputs = family.text_inputs(tokenizers, sampler.max_sequence_length)
    scheduler = family.scheduler(checkpoint.scheduler, sampler.time_shift, sampler.base_shift, sampler.max_shift)
    cache = sampler.step_cache and sampler.step_cache.name
    if cache and cache not in family.step_caches:
        raise UserError(f"sampler.step_cache={cache}: expected null: this model, of {family.name}, has no such cache")
    if cache and hardware.stream_blocks:
        raise UserError(
            f"sampler.step_cache={cache}: expected null with hardware.stream_blocks=true, which reads the next blocks "
            "before it is known whether they are needed"
        )
    facts = {
        "model_digest": checkpoint.digest(),
        "weights_dtype": weights,
        "activations_dtype": activations,
        "max_sequence_length": sampler.max_sequence_length,
        "schedule": dict(scheduler.facts()),
        **family.index(),
    }
    caching = {"step_cache": cache or "", "step_cache_threshold": sampler.step_cache_threshold if cache else 0.0}
    facts |= caching if cache else {}  # nor did facts know of it before there was any
    facts |= {"matmul_dtype": matmul} if matmul else {}  # likewise
    record = {"model": public(_name(job.model.pretrained_model_name_or_path)), "model_digest": facts["model_digest"]}
    record |= {"model_revision": checkpoint.revision or ""}
    record |= (
        {key: facts[key] for key in ("max_sequence_length", "weights_dtype", "activations_dtype")}
        | caching
        | {"matmul_dtype": matmul or ""}
        | family.index()
    )
    record |= {
        "fluxbatch_version": __version__,
        "jax_version": jax.__version__,
        "device_kind": mesh.devices.flat[0].device_kind,
    }
    record |= {"device_count": mesh.size, "per_device_batch_size": sharding.per_device_batch_size}
    record |= {"quality": 100 if job.output.format.name == "png" else job.output.quality}
    if parts.lora.adapters:
        facts["lora"] = parts.lora.fingerprint
    precision = functools.partial(_precision, family, weights=weights, activations=activations, products=bool(matmul))
    held = {part: load.held(plan, mesh, precision(part)) for part, plan in parts.plans.items()}
    text = sum(held[part] for part in family.encoders)
    away, turns = device_weights.offload_policy(hardware.offload_encoders, mesh, text, group), "keep"
    if away != "keep" and not hardware.stream_blocks:
        encoding, drawing = (size // mesh.size for size in (text, sum(held.values()) - text))
        fits = group.all_say(not device_weights.crowded(encoding, drawing, device_weights.device_memory(mesh)))
        turns = "keep" if fits else device_weights.offload_policy(True, mesh, sum(held.values()), group)
    split = {axis: size for axis, size in mesh.shape.items() if size > 1 and axis != "data"}
    if hardware.stream_blocks and (split or processes > 1):
        got = (
            f"a mesh of {', '.join(f'{axis} {size}' for axis, size in split.items())}"
            if split
            else f"{processes} processes"
        )
        raise UserError(
            f"hardware.stream_blocks=true: got {got}: expected whole blocks on each device of one process: "
            "sharding=single or ddp"
        )
    programs = (
        family.name,
        type(scheduler),
        hardware.attention.name,
        hardware.split_head_dim,
        str(hardware.flash_block_sizes),
        away,
        turns,
        hardware.stream_blocks,
        cache,
        matmul,
    )
    identity = (
        tuple(plan.source.url for plan in parts.plans.values()),
        facts["model_digest"],
        weights,
        activations,
        tuple(mesh.shape.values()),
        *programs,
    )
    return ModelSpec(
        checkpoint,
        family,
        parts.plans,
        inputs,
        scheduler,
        mesh,
        weights,
        activations,
        bool(matmul),
        sampler.step_cache_threshold if cache else None,
        hardware.stream_blocks,
        away,
        turns,
        facts,
        record,
        parts.lora,
        parts.open_encoder,
        identity,
        family.warnings(job.model.flux_name),
        bool(job.sweep),
        group,
    )


def _precision(family: Family, part: str, weights: str, activations: str, products: bool) -> Precision:
    """Eight bits are for the denoiser and the text encoders alone, and products in them for the denoiser."""
    own = Precision.named(weights, activations, products and part == family.denoiser)
    return own if part in (*family.encoders, family.denoiser) else Precision(own.rest)


def _name(given: str) -> str:
    """How records call a model: a path's last part, as the rest says where it lies on one machine; an address without
    its query, which may hold a token."""
    path = os.path.abspath(os.path.expanduser(given.removeprefix("file://")))
    return os.path.basename(path) if os.path.exists(path) else given.partition("?")[0]
