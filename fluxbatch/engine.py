"""A job's model, opened (headers, digest: cheap) and then loaded (weights on devices)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fluxbatch.config import Job
from fluxbatch.dist.mesh import make_mesh, mesh_shape
from fluxbatch.models import attention
from fluxbatch.pipeline import Models, Pipeline
from fluxbatch.sampling import Schedule
from fluxbatch.text import Tokenizers
from fluxbatch.types import Row, UserError
from fluxbatch.weights import load, lora_apply
from fluxbatch.weights.checkpoint import Checkpoint, open_checkpoint
from fluxbatch.weights.lora_apply import Loras


@dataclasses.dataclass(frozen=True)
class Engine:
    """Everything about the model that can be known, and be wrong, before a weight is read."""

    checkpoint: Checkpoint
    plans: Mapping[str, load.Plan]
    tokenizers: Tokenizers
    schedule: Schedule
    mesh: jax.sharding.Mesh
    weights_dtype: str
    activations_dtype: str
    facts: Mapping[str, Any]  # what decides the pixels besides the row
    record: Mapping[str, Any]  # what every image's record says of the model
    lora: Loras
    identity: tuple[Any, ...]  # two engines that agree in it load the same weights and programs
    remarks: tuple[str, ...]  # what is allowed and probably not meant
    keep: bool  # whether the next job of this process may want the weights: one of a sweep

    @property
    def nbytes(self) -> int:
        return sum(plan.nbytes for plan in self.plans.values())

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def multiple(self) -> int:
        """Heights and widths must be multiples of this many pixels."""
        return 2 * self.checkpoint.components["vae"].config.scale

    def resolve(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, each with its mix of adapters; UserError for mixes that cannot be in one job."""
        return self.lora.resolve(rows)

    def load(self, offload_encoders: bool, progress: load.Progress, rows: Sequence[Row] = ()) -> Pipeline:
        """Streams the weights onto the mesh; ``progress`` is told the bytes.

        Adapters are merged into the weights if all of ``rows`` (resolved) have one mix, else they stand
        beside them. Within a sweep the weights of the job before stay, but for what adapters change.
        """
        mixes = self.lora.mixes(rows) or [self.lora.own]
        beside = self.lora if len(mixes) > 1 else None
        identity = (self.identity, offload_encoders, beside and tuple(beside.facts.items()))
        merged = {name: {} if beside else self.lora.edits(part, mixes[0]) for name, part in PARTS.items()}
        tag = None if beside else tuple((self.lora.facts[name], scale) for name, scale in mixes[0])
        kept, _kept[:] = _kept[:], []
        dtype = jnp.dtype(self.weights_dtype)
        if kept and kept[0].identity == identity:
            now = kept[0]
            now.pipeline.schedule = self.schedule
            for name, part in PARTS.items() if now.tag != tag else ():
                if paths := now.touched[name] | {path for path, _ in merged[name]}:
                    plan = self.plans[part]
                    now.pipeline.swap(name, lambda state: load.reload(plan, state, paths, self.mesh, dtype, progress, merged[name]))  # noqa: B023
            pipeline = now.pipeline
        else:
            kept.clear()  # its memory is needed
            models = {}
            for name, part in PARTS.items():
                models[name] = load.load(self.plans[part], self.mesh, dtype, progress, merged[name])
                if beside:
                    beside.attach(part, models[name], self.plans[part], self.mesh, dtype)
            pipeline = Pipeline(Models(**models), self.mesh, self.activations_dtype, self.schedule, offload_encoders, beside)
        if self.keep:
            touched = {name: {path for path, _ in edits} for name, edits in merged.items()}
            _kept.append(Kept(identity, pipeline, tag, touched))
        return pipeline


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a job of a sweep leaves to the next one."""

    identity: Any
    pipeline: Pipeline
    tag: Any  # which adapters are merged, at which scales
    touched: Mapping[str, set[str]]  # by network: the parameters that they changed


_kept: list[Kept] = []  # at most one
PARTS = {"t5": "text_encoder_2", "clip": "text_encoder", "flux": "transformer", "vae": "vae"}


def open_engine(job: Job, platform: str) -> Engine:
    """Opens the checkpoint and checks it against the job; UserError for anything that cannot work."""
    hardware, sampler = job.hardware, job.sampler
    default = "float32" if platform == "cpu" else "bfloat16"
    weights, activations = (default if d.name == "auto" else d.name for d in (hardware.weights_dtype, hardware.activations_dtype))
    try:
        shape = mesh_shape(job.sharding.ici_data_parallelism, job.sharding.ici_fsdp_parallelism, len(jax.devices()))
        attend = attention.by_name(hardware.attention.name, platform, activations, hardware.flash_block_sizes)
    except ValueError as error:
        raise UserError(str(error)) from error
    checkpoint = open_checkpoint(job.model)
    options: dict[str, Mapping[str, Any]] = {"transformer": {"attention": attend, "split_head_dim": hardware.split_head_dim}}
    plans = _collect({name: lambda c=c, o=options.get(name, {}): c.plan(**o) for name, c in checkpoint.components.items()})
    tokenizers = Tokenizers(checkpoint.tokenizer, checkpoint.tokenizer_2, sampler.max_sequence_length)
    schedule = Schedule.of(checkpoint.scheduler, sampler.time_shift, sampler.base_shift, sampler.max_shift)
    facts = {
        "model_digest": checkpoint.digest(),
        "weights_dtype": weights,
        "activations_dtype": activations,
        "max_sequence_length": sampler.max_sequence_length,
        "schedule": dataclasses.asdict(schedule),
    }
    record = {"model": job.model.pretrained_model_name_or_path, "model_digest": facts["model_digest"], "model_revision": checkpoint.revision}
    record |= {key: facts[key] for key in ("max_sequence_length", "weights_dtype", "activations_dtype")}
    adapters = lora_apply.read(job, plans)
    if adapters.adapters:
        facts["lora"] = adapters.facts
    programs = (hardware.attention.name, hardware.split_head_dim, str(hardware.flash_block_sizes))
    identity = (tuple(plan.source.url for plan in plans.values()), facts["model_digest"], weights, activations, shape, *programs)
    return Engine(
        checkpoint, plans, tokenizers, schedule, make_mesh(shape), weights, activations, facts, record, adapters, identity,
        _remarks(job.model.flux_name, checkpoint), bool(job.sweep))  # fmt: skip


def _remarks(flux_name: str, checkpoint: Checkpoint) -> tuple[str, ...]:
    """A dev model under schnell's settings, or the other way round."""
    guided = checkpoint.components["transformer"].config.guidance_embeds
    for kind, expected in (("schnell", False), ("dev", True)):
        if kind in flux_name.split("-") and guided != expected:
            has = "a" if guided else "no"
            return (f"model.flux_name={flux_name}, but the checkpoint has {has} guidance embedding: are the sampler's settings meant for it?",)
    return ()


def _collect(makers: Mapping[str, Callable[[], load.Plan]]) -> dict[str, load.Plan]:
    """Every component's plan, or one error with the complaints of all of them."""
    plans, lines = {}, []
    for name, make in makers.items():
        try:
            plans[name] = make()
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(*lines)
    return plans
