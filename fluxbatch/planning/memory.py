"""How much memory a device needs in each phase of a job: weights by their shardings, activations by estimate.

The estimate counts what the compiler keeps alive at the widest point of each program; tests hold it against the
compiler's own figure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from fluxbatch.config.schema import Job
from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.generation.model_spec import Engine
from fluxbatch.generation.programs import pixels_at_once, together
from fluxbatch.generation.steps import STEPS
from fluxbatch.models import attention
from fluxbatch.models.family import Footprint
from fluxbatch.weights import device_weights, load


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

    engine: Engine
    platform: str
    sizes: Sequence[tuple[int, int]]  # heights and widths of the pictures
    images: int  # of a device at once
    stay: bool  # whether the text encoders stay on the devices
    again: bool  # whether they come back once the transformer is there
    scores: bool  # whether attention writes all its scores down
    limit: int | None  # bytes of a device
    devices: Sequence[jax.Device]  # all that there are
    beside: int = 0  # bytes of adapters that are not merged

    @classmethod
    def of(
        cls, job: Job, engine: Engine, platform: str, sizes: Sequence[tuple[int, int]], again: bool, limit: int | None = None,
        devices: Sequence[jax.Device] = (),
    ) -> Situation:  # fmt: skip
        offload = job.hardware.offload_encoders
        stay = offload is False or (platform == "cpu" and offload != "free")  # a CPU has no other memory
        scores = platform != "cpu" and attention.chosen(job.hardware.attention.name, platform, engine.activations_dtype) == "dot_product"
        images = job.sharding.per_device_batch_size
        return cls(engine, platform, sizes, images, stay, again, scores, limit, devices or list(engine.mesh.devices.flat))

    @property
    def turns(self) -> bool:
        """Whether the transformer makes room for the encoders when they come back."""
        drawing = sum(on_a_device(self.engine, part) for part in self.engine.plans) - encoders(self.engine)
        return not (self.stay or self.engine.stream) and device_weights.crowded(encoders(self.engine), drawing, self.limit)

    def phases(self) -> list[Phase]:
        """Encode, denoise and decode, each for the largest picture."""
        engine, family = self.engine, self.engine.family
        weights = {part: on_a_device(engine, part) for part in engine.plans}
        if engine.stream:
            weights[family.denoiser] = streamed(engine)
        text, decoder = encoders(engine), weights[family.decoder]
        drawing = sum(weights.values()) - text + self.beside
        resident = drawing + (text if self.stay else 0)
        beside = (decoder if self.turns else drawing) if self.stay or self.again else 0
        at = self.footprint()
        return [
            Phase("encode", text + beside, family.encode_bytes(at, engine.inputs)),
            Phase("denoise", resident, family.denoise_bytes(at, engine.inputs)),
            Phase("decode", resident, family.decode_bytes(at) + gathered(engine, family.decoder)),
        ]

    def footprint(self) -> Footprint:
        """Of the largest picture."""
        engine = self.engine
        height, width = max(self.sizes, key=math.prod)
        dtypes = (jnp.dtype(name).itemsize for name in (engine.activations_dtype, engine.weights_dtype))
        at_once = together(self.images, height, width, pixels_at_once(self.platform))
        return Footprint(self.images, height, width, self.platform, *dtypes, dict(engine.mesh.shape), self.scores, STEPS, at_once)

    def way_out(self, limit: int) -> tuple[str, ...]:
        """The fewest settings with which every phase fits in ``limit``, slow ones last; none if nothing does."""
        engine, ways = self.engine, {}
        offload = "offload_encoders=free" if self.platform == "cpu" else "offload_encoders=true"
        if self.scores and attention.chosen("auto", self.platform, engine.activations_dtype) != "dot_product":
            ways["attention=auto"] = {"scores": False}
        ways[offload] = {"stay": False}
        if self.images > 1:
            ways["per_device_batch_size=1"] = {"images": 1}
        whole = all(engine.mesh.shape[axis] == 1 for axis in ("fsdp", "context", "tensor"))
        if whole and len(self.devices) > 1:
            mesh = make_mesh((1, len(self.devices)), devices=self.devices)
            ways["sharding=fsdp"] = {"engine": replace(engine, mesh=mesh), "stay": True}  # as it has it, unless it is told otherwise
        if whole and not engine.stream:
            ways["stream_blocks=true"] = {"engine": replace(engine, stream=True)}
        tried = [names for count in range(1, len(ways) + 1) for names in itertools.combinations(ways, count)]
        for names in sorted(tried, key=lambda names: "stream_blocks=true" in names):
            if len({"sharding=fsdp", "stream_blocks=true"} & {*names}) < 2:
                last = sorted(names, key=offload.__eq__)  # it wins over what sharding=fsdp says of it
                changed = replace(self, limit=limit, **{key: value for name in last for key, value in ways[name].items()})
                if all(phase.total <= limit for phase in changed.phases()):
                    return names
        return ()


def parameters(engine: Engine, part: str) -> int:
    """How many numbers a component has."""
    return sum(math.prod(leaf.get_value().shape) for _, leaf in nnx.to_flat_state(engine.plans[part].state))


def adapters(engine: Engine) -> int:
    """Bytes of all adapters beside the weights, as if no device shared them."""
    numbers = sum(part.parameters for adapter in engine.lora.adapters for part in adapter.parts)
    return numbers * jnp.dtype(engine.weights_dtype).itemsize


def encoders(engine: Engine) -> int:
    """Bytes of the text encoders' weights on a device."""
    return sum(on_a_device(engine, part) for part in engine.family.encoders)


def on_a_device(engine: Engine, part: str) -> int:
    """Bytes of a component's weights."""
    return load.held(engine.plans[part], engine.mesh, engine.weights_dtype) // engine.mesh.size


def gathered(engine: Engine, part: str) -> int:
    """Bytes of a component's weights, made whole on a device where FSDP has divided them."""
    return parameters(engine, part) * jnp.dtype(engine.weights_dtype).itemsize if engine.mesh.shape["fsdp"] > 1 else 0


def streamed(engine: Engine) -> int:
    """What is on a device when the denoiser's blocks pass through it: two of them without their step layers, which have
    passed before, and what lies in none."""
    plan = engine.plans[engine.family.denoiser]
    stream = nnx.merge(plan.graph, plan.state).stream()
    layers = [f"{layer}." for each in stream.step_layers.values() for layer in each]
    rest, blocks = 0, {stack: 0 for stack, _ in stream.blocks}
    for path, (_, shape) in plan.shapes.items():
        stack, numbers = path.partition(".")[0], math.prod(shape)
        if stack not in blocks:
            rest += numbers
        elif not path.startswith(tuple(layers)):
            blocks[stack] += numbers
    return (rest + 2 * max(blocks.values())) * jnp.dtype(engine.weights_dtype).itemsize
