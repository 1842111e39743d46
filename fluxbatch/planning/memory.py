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
from fluxbatch.generation.model_spec import PARTS, Engine
from fluxbatch.generation.programs import pixels_at_once, together
from fluxbatch.generation.sampling import STEPS
from fluxbatch.lora import apply
from fluxbatch.models import attention
from fluxbatch.models.autoencoder import VaeConfig
from fluxbatch.models.flux1.clip import ClipConfig
from fluxbatch.models.flux1.t5 import T5Config
from fluxbatch.models.flux1.transformer import FluxConfig
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
    text: int  # T5 tokens
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
        images, text = job.sharding.per_device_batch_size, job.sampler.max_sequence_length
        return cls(engine, platform, sizes, images, text, stay, again, scores, limit, devices or list(engine.mesh.devices.flat))

    @property
    def turns(self) -> bool:
        """Whether the transformer makes room for the encoders when they come back."""
        drawing = sum(on_a_device(self.engine, PARTS[name]) for name in ("flux", "vae"))
        return not (self.stay or self.engine.stream) and device_weights.crowded(encoders(self.engine), drawing, self.limit)

    def phases(self) -> list[Phase]:
        """Encode, denoise and decode, each for the largest picture."""
        engine, images = self.engine, self.images
        t5, clip, vae = (engine.checkpoint.components[part].config for part in ("text_encoder_2", "text_encoder", "vae"))
        weights = {part: on_a_device(engine, part) for part in PARTS.values()}
        if engine.stream:
            weights["transformer"] = streamed(engine)
        dtype = jnp.dtype(engine.activations_dtype).itemsize
        cut = jnp.dtype(engine.weights_dtype).itemsize if self.platform == "cpu" else 0
        drawing = weights["transformer"] + weights["vae"] + self.beside
        height, width = max(self.sizes, key=math.prod)
        tokens = height * width // engine.multiple**2
        text = encoders(engine)
        resident = drawing + (text if self.stay else 0)
        beside = (weights["vae"] if self.turns else drawing) if self.stay or self.again else 0
        return [
            Phase("encode", text + beside, encode(t5, clip, images, self.text, dtype, cut)),
            Phase("denoise", resident, denoise(engine, images, tokens, self.text, self.platform, self.scores)),
            Phase("decode", resident, decode(vae, images, height, width, self.platform) + gathered(engine, "vae")),
        ]

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
    """Bytes of T5's and CLIP's weights on a device."""
    return sum(on_a_device(engine, part) for part in apply.TEXT)


def on_a_device(engine: Engine, part: str) -> int:
    """Bytes of a component's weights."""
    return load.held(engine.plans[part], engine.mesh, engine.weights_dtype) // engine.mesh.size


def gathered(engine: Engine, part: str) -> int:
    """Bytes of a component's weights, made whole on a device where FSDP has divided them."""
    return parameters(engine, part) * jnp.dtype(engine.weights_dtype).itemsize if engine.mesh.shape["fsdp"] > 1 else 0


def streamed(engine: Engine) -> int:
    """What is on a device when the transformer's blocks pass through it: two of them without what makes their
    modulation, which has passed before, and what lies in none."""
    rest, blocks = 0, {"double_blocks": 0, "single_blocks": 0}
    for path, (_, shape) in engine.plans["transformer"].shapes.items():
        stack, numbers = path.partition(".")[0], math.prod(shape)
        if stack not in blocks:
            rest += numbers
        elif ".mod." not in path:
            blocks[stack] += numbers
    return (rest + 2 * max(blocks.values())) * jnp.dtype(engine.weights_dtype).itemsize


def denoise(engine: Engine, images: int, tokens: int, text: int, platform: str, scores: bool) -> int:
    """The modulation of some steps, and in a single block: the sequence and its normed form, and in heads and hidden
    units q, k, v and the MLP's four widths; what else there is differs from compiler to compiler. ``tokens``, ``text``:
    of an image. ``scores``: attention's too, in float32."""
    cfg: FluxConfig = engine.checkpoint.components["transformer"].config
    shape, d = engine.mesh.shape, cfg.width
    dtype, weight = (jnp.dtype(name).itemsize for name in (engine.activations_dtype, engine.weights_dtype))
    modulation = images * STEPS * d * dtype * (12 * cfg.num_layers + 3 * cfg.num_single_layers + 2)
    width = images * (tokens + text) // shape["context"] * d * dtype
    layer = 12 * d * d * weight // shape["tensor"]  # of a single block; a double one has twice that
    if platform == "cpu":  # cuts each layer from its stack
        return modulation + max(layer + 13 * width, 2 * layer + 6 * width)
    gathered = layer + layer // 2 if shape["fsdp"] > 1 else 0  # three quarters of a double block: its MLPs come ahead
    written = 4 * images * cfg.num_attention_heads * (tokens + text) ** 2 // (shape["context"] * shape["tensor"]) if scores else 0
    return modulation + gathered + 2 * width + 6 * width // shape["tensor"] + written


def encode(t5: T5Config, clip: ClipConfig, images: int, text: int, dtype: int, weight: int) -> int:
    """Scores in float32, twice, T5's bias, and what a block works on. ``weight``: bytes of a number of those layers
    that the CPU cuts from their stack; else 0."""
    scores, length = 4 * t5.num_heads * text**2, clip.max_position_embeddings
    of_t5 = scores * (1 + 2 * images) + 4 * images * text * t5.d_model * dtype
    of_clip = 4 * images * length * (clip.num_attention_heads * length + 4 * clip.hidden_size)
    layer_t5 = t5.d_model * (4 * t5.num_heads * t5.d_kv + 3 * t5.d_ff)
    layer_clip = clip.hidden_size * (4 * clip.hidden_size + 2 * clip.intermediate_size)
    return max(of_t5 + weight * layer_t5, of_clip + weight * layer_clip)


def decode(cfg: VaeConfig, images: int, height: int, width: int, platform: str) -> int:
    """The widest resnet in float32, in which pictures that bfloat16 cannot hold are decoded again, of the pictures that are
    decoded at once: its input, once as it is and once as the convolution that doubled the pixels left it, the normed form and
    the outputs of its convolutions. Of TPUs and GPUs the factor lies between libtpu's figures for FLUX.1 on one v6e, 6 % more
    at 1024 × 1024, and XLA:GPU's and those of meshes of four TPUs, 5 % less. What cuDNN takes to work in is not known before."""
    widest, pixels = 0.0, height * width
    sizes = cfg.block_out_channels
    for size, before in zip(sizes, (*sizes[1:], sizes[-1]), strict=True):
        widest = max(widest, pixels * (2.13 * before if platform != "cpu" else max(3 * before, before + 3 * size)))
        pixels //= 4
    return int(4 * together(images, height, width, pixels_at_once(platform)) * widest) + 3 * images * height * width
