"""How much memory a device needs in each phase of a job: weights by their shardings, activations by estimate.

The estimate counts what the compiler keeps alive at the widest point of each program; tests hold it against the
compiler's own figure.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxbatch.config.schema import Job
from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.generation.model_spec import ModelSpec
from fluxbatch.generation.programs import pixels_at_once, together
from fluxbatch.generation.steps import STEPS
from fluxbatch.models import attention
from fluxbatch.models.family import Footprint, padded_to
from fluxbatch.models.layers import EIGHT_BITS
from fluxbatch.types import Mode
from fluxbatch.weights import device_weights, load

Size = tuple[int, int, Mode]  # height, width
STREAM, EIGHT = "stream_blocks=true", "weights_dtype=int8"


@dataclass(frozen=True)
class Phase:
    """Bytes of one device."""

    name: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True)
class Situation:
    """What decides how much memory is needed."""

    spec: ModelSpec
    platform: str
    sizes: Sequence[Size]  # of the images
    images: int  # of a device at once
    stay: bool  # whether the text encoders stay on the devices
    again: bool  # whether they come back once the transformer is there
    scores: bool  # whether attention writes all its scores down
    limit: int | None  # bytes of a device
    devices: Sequence[jax.Device]  # all that there are
    beside: int = 0  # bytes of adapters that are not merged

    @classmethod
    def of(
        cls,
        job: Job,
        spec: ModelSpec,
        platform: str,
        sizes: Sequence[Size],
        again: bool,
        limit: int | None = None,
        devices: Sequence[jax.Device] = (),
    ) -> Situation:
        offload = job.hardware.offload_encoders
        stay = offload is False or (platform == "cpu" and offload != "free")  # a CPU has no other memory
        kernel = attention.chosen(job.hardware.attention.name, platform, spec.activations_dtype)
        scores = platform != "cpu" and kernel == "dot_product"
        images = job.sharding.per_device_batch_size
        return cls(spec, platform, sizes, images, stay, again, scores, limit, devices or list(spec.mesh.devices.flat))

    @property
    def takes_turns(self) -> bool:
        """Whether the transformer makes room for the encoders when they come back."""
        denoising = sum(on_a_device(self.spec, part) for part in self.spec.plans) - encoders(self.spec)
        return not (self.stay or self.spec.stream) and device_weights.crowded(
            encoders(self.spec), denoising, self.limit
        )

    def phases(self) -> list[Phase]:
        """Encode, denoise and decode, each for the largest image."""
        spec, family = self.spec, self.spec.family
        weights = {part: on_a_device(spec, part) for part in spec.plans}
        if spec.stream:
            weights[family.denoiser] = streamed(spec)
        text, decoder = encoders(spec), weights[family.decoder]
        denoising = sum(weights.values()) - text + self.beside
        resident = denoising + (text if self.stay else 0)
        beside = (decoder if self.takes_turns else denoising) if self.stay or self.again else 0
        at = self.footprint()
        inputs = padded_to(spec.inputs, max(at.mode.texts, key=sum, default=()))
        return [
            Phase("encode", text + beside, family.encode_bytes(at, inputs)),
            Phase("denoise", resident, family.denoise_bytes(at, inputs)),
            Phase("decode", resident, family.decode_bytes(at) + gathered(spec, family.decoder)),
        ]

    def footprint(self) -> Footprint:
        """Of the largest image."""
        spec = self.spec
        height, width, mode = max(self.sizes, key=functools.partial(tokens, spec))
        activation, precision = jnp.dtype(spec.activations_dtype).itemsize, spec.precision(spec.family.denoiser)
        weight = (precision.kernels or precision.rest).itemsize
        if self.platform == "cpu":  # the layer that is cut from its stack, as it is multiplied or beside that
            weight = weight + activation if precision.kernels else max(weight, 4)
        at_once = together(self.images, height, width, pixels_at_once(self.platform))
        mesh = dict(spec.mesh.shape)
        return Footprint(
            self.images, height, width, self.platform, activation, weight, mesh, self.scores, STEPS, at_once, mode
        )

    def remedy(self, limit: int) -> tuple[str, ...]:
        """The fewest settings, all of them exact, with which every phase fits in ``limit``, slow ones last; none if
        nothing does."""
        spec = self.spec
        options: dict[str, dict[str, Any]] = {}
        offload = "offload_encoders=free" if self.platform == "cpu" else "offload_encoders=true"
        if self.scores and attention.chosen("auto", self.platform, spec.activations_dtype) != "dot_product":
            options["attention=auto"] = {"scores": False}
        options[offload] = {"stay": False}
        if self.images > 1:
            options["per_device_batch_size=1"] = {"images": 1}
        whole = all(spec.mesh.shape[axis] == 1 for axis in ("fsdp", "context", "tensor"))
        if whole and len(self.devices) > 1:
            mesh = make_mesh((1, len(self.devices)), devices=self.devices)
            options["sharding=fsdp"] = {"spec": replace(spec, mesh=mesh), "stay": True}  # as its file says
        if whole and not spec.stream:
            options[STREAM] = {"spec": replace(spec, stream=True)}
        tried = [names for count in range(1, len(options) + 1) for names in itertools.combinations(options, count)]
        for names in sorted(tried, key=lambda names: STREAM in names):
            if len({"sharding=fsdp", STREAM} & {*names}) < 2:
                last = sorted(names, key=offload.__eq__)  # it wins over what sharding=fsdp says of it
                changed = replace(
                    self, limit=limit, **{key: value for name in last for key, value in options[name].items()}
                )
                if all(phase.total <= limit for phase in changed.phases()):
                    return names
        return ()

    def inexact_remedy(self, limit: int) -> tuple[str, ...]:
        """The same with weights in eight bits, which draw slightly other images."""
        if self.spec.weights_dtype in EIGHT_BITS:
            return ()
        own = replace(self, spec=replace(self.spec, weights_dtype="int8"), limit=limit)
        if all(phase.total <= limit for phase in own.phases()):
            return (EIGHT,)
        return (EIGHT, *found) if (found := own.remedy(limit)) else ()


def tokens(spec: ModelSpec, size: Size) -> int:
    """Of an image, its references and its prompt."""
    return spec.family.tokens(*size) + size[-1].text_tokens


def parameters(spec: ModelSpec, part: str) -> int:
    """How many numbers a component has."""
    return sum(math.prod(leaf.get_value().shape) for _, leaf in nnx.to_flat_state(spec.plans[part].state))


def adapters(spec: ModelSpec) -> int:
    """Bytes of all adapters beside the weights, as if no device shared them."""
    numbers = sum(part.parameters for adapter in spec.lora.adapters for part in adapter.parts)
    return numbers * spec.precision(spec.family.denoiser).rest.itemsize


def encoders(spec: ModelSpec) -> int:
    """Bytes of the text encoders' weights on a device."""
    return sum(on_a_device(spec, part) for part in spec.family.encoders)


def on_a_device(spec: ModelSpec, part: str) -> int:
    """Bytes of a component's weights."""
    return load.held(spec.plans[part], spec.mesh, spec.precision(part)) // spec.mesh.size


def gathered(spec: ModelSpec, part: str) -> int:
    """Bytes of a component's weights, made whole on a device where FSDP has divided them."""
    return parameters(spec, part) * spec.precision(part).rest.itemsize if spec.mesh.shape["fsdp"] > 1 else 0


def streamed(spec: ModelSpec) -> int:
    """What is on a device when the denoiser's blocks pass through it: two of them without their step layers, which have
    passed before, and what lies in none."""
    plan, precision = spec.plans[spec.family.denoiser], spec.precision(spec.family.denoiser)
    stream = nnx.merge(plan.graph, plan.state).stream()
    layers = [f"{layer}." for each in stream.step_layers.values() for layer in each]
    rest, blocks = 0, {stack: 0 for stack, _ in stream.blocks}
    for path, size in load.sizes(plan, precision).items():
        stack = path.partition(".")[0]
        if stack not in blocks:
            rest += size
        elif not path.startswith(tuple(layers)):
            blocks[stack] += size // dict(stream.blocks)[stack]
    return rest + 2 * max(blocks.values())
