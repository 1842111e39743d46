"""A job's model, opened (headers, digest: cheap) and then loaded (weights on devices)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fluxbatch.config import Job
from fluxbatch.dist.mesh import make_mesh, mesh_shape
from fluxbatch.models import attention
from fluxbatch.pipeline import Models, Pipeline
from fluxbatch.sampling import Schedule
from fluxbatch.text import Tokenizers
from fluxbatch.types import UserError
from fluxbatch.weights import load
from fluxbatch.weights.checkpoint import Checkpoint, open_checkpoint


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

    def load(self, offload_encoders: bool, progress: load.Progress) -> Pipeline:
        """Streams the weights onto the mesh; ``progress`` is told the bytes."""
        names = {"t5": "text_encoder_2", "clip": "text_encoder", "flux": "transformer", "vae": "vae"}
        loaded = {name: load.load(self.plans[part], self.mesh, jnp.dtype(self.weights_dtype), progress) for name, part in names.items()}
        return Pipeline(Models(**loaded), self.mesh, self.activations_dtype, self.schedule, offload_encoders)


def open_engine(job: Job, platform: str) -> Engine:
    """Opens the checkpoint and checks it against the job; UserError for anything that cannot work."""
    hardware, sampler = job.hardware, job.sampler
    try:
        shape = mesh_shape(job.sharding.ici_data_parallelism, job.sharding.ici_fsdp_parallelism, len(jax.devices()))
        attend = attention.by_name(hardware.attention.name, platform, hardware.flash_block_sizes)
    except ValueError as error:
        raise UserError(str(error)) from error
    checkpoint = open_checkpoint(job.model)
    options: dict[str, Mapping[str, Any]] = {"transformer": {"attention": attend, "split_head_dim": hardware.split_head_dim}}
    plans = _collect({name: lambda c=c, o=options.get(name, {}): c.plan(**o) for name, c in checkpoint.components.items()})
    tokenizers = Tokenizers(checkpoint.tokenizer, checkpoint.tokenizer_2, sampler.max_sequence_length)
    schedule = Schedule.of(checkpoint.scheduler, sampler.time_shift, sampler.base_shift, sampler.max_shift)
    default = "float32" if platform == "cpu" else "bfloat16"
    weights, activations = (default if d.name == "auto" else d.name for d in (hardware.weights_dtype, hardware.activations_dtype))
    facts = {
        "model_digest": checkpoint.digest(),
        "weights_dtype": weights,
        "activations_dtype": activations,
        "max_sequence_length": sampler.max_sequence_length,
        "schedule": dataclasses.asdict(schedule),
    }
    record = {"model": job.model.pretrained_model_name_or_path, "model_digest": facts["model_digest"], "model_revision": checkpoint.revision}
    record |= {key: facts[key] for key in ("max_sequence_length", "weights_dtype", "activations_dtype")}
    return Engine(checkpoint, plans, tokenizers, schedule, make_mesh(shape), weights, activations, facts, record)


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
