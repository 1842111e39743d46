"""What the devices run, as pure functions of arrays: text → conditioning, latents a step on, latents → pixels.

``graph`` is a network's definition and ``state`` its parameters, as ``nnx.split`` gives them; ``scales`` are those of
each row's adapters. ``pipeline.py`` compiles them. Axes: B rows, S steps, L tokens of C channels; the tests check them
as programs are traced.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from fluxbatch.distributed.mesh import data_parallel_size_of
from fluxbatch.models.dit import led
from fluxbatch.models.family import (
    Conditioning,
    Denoiser,
    Family,
    Pictures,
    Positions,
    StepInputs,
    StreamedDenoiser,
)
from fluxbatch.models.layers import gathered, set_rows
from fluxbatch.models.network import CachedDenoiser
from fluxbatch.models.step_cache import StepCache

Graph = nnx.GraphDef[Any]
State = Any  # nnx.State, a pytree of parameters
SchedulerStep = Callable[[Array, Array, Array, Array], Array]  # models/schedulers.py
Latents = Float[Array, "B L C"]
Sigmas = Float[Array, "B levels"]  # noise levels before each step, and behind the last one
PerRow = Float[Array, " B"]
Scales = Float[Array, "B adapters"]
Count = Int[Array, ""]

# XLA:CPU leaves products, convolutions and sums to a library, YNNPACK. On a CPU without AVX-512 (EPYC) its convolutions
# are slower than XLA's: the decoder of the bench's middle takes 6.3 s with them and 5.3 without; with AVX-512 (Xeon)
# 2.2 and 2.3. Over flux-mini's 12 channels it gains nothing, and its first run took as long as two more.
_NARROW = 16
_YNN, _SUMS = "xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_REDUCE"
# Where XLA:CPU multiplies bfloat16 weights in float32, it would bring all layers of a stack to that before it loops
# over them, beside the weights, in twice their memory; so it brings each layer in its turn.
_CPU_STACKS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
# libtpu looks longer for the tiles of a convolution the more room they have: a decoder of 256×256 is compiled in 68 s
# with this, and not within 220 s with what conf/hardware gives the transformer. (Which of the two runs faster was not
# compared.)
_TPU_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "16384"}
# A device decodes pictures together as long as they have no more pixels than this: beyond it each would take
# memory of its own, and on a CPU leave its caches.
_TOGETHER, _TOGETHER_ON_A_CPU = 512 * 512, 2 * 128 * 128


def _model(graph: Graph, state: State, scales: Scales | None = None) -> Any:
    model = nnx.merge(graph, state)
    return model if scales is None else set_rows(model, scales)


def encode(
    family: Family, graphs: Sequence[Graph], dtype: Any, states: Mapping[str, State],
    inputs: Sequence[tuple[Array, ...]], scales: Scales | None = None,
) -> Conditioning:  # fmt: skip
    """Conditioning of the arrays of each text input. ``graphs``, ``states``: of each text encoder."""
    models = {name: _model(graph, states[name], scales) for name, graph in zip(family.encoders, graphs, strict=True)}
    return family.encode(models, inputs, dtype)


def step_inputs(
    graph: Graph, dtype: Any, state: State, conditioning: Conditioning, sigmas: Sigmas, guidance: PerRow,
    scales: Scales | None = None,
) -> StepInputs:  # fmt: skip
    """All that ``denoise`` needs of the steps, and of the weights that it can do without."""
    model: Denoiser = _model(graph, state, scales)
    return model.step_inputs(conditioning, sigmas, guidance, dtype)


def begin(noise: Latents, pictures: Pictures, sigmas: Float[Array, "B _"]) -> Latents:
    """The latents of the first step: noise ``[B, L, C]``, or the start picture with as much of it as the first of
    ``sigmas`` ``[B, S + 1]`` says."""
    if pictures.start is None:
        return noise
    share = sigmas[:, 0, None, None]
    return share * noise + (1 - share) * pictures.start


def denoise(
    scheduler_step: SchedulerStep, graph: Graph, dtype: Any, state: State, latents: Latents,
    conditioning: Sequence[Conditioning], inputs: Sequence[StepInputs], sigmas: Sigmas, left: Int[Array, " B"],
    turns: Count, positions: Sequence[Positions], cfg_scale: PerRow | None, noise: Latents | None, pictures: Pictures,
    scales: Scales | None = None,
) -> Latents:  # fmt: skip
    """As many steps as ``turns``; a row that has none ``left`` stands still. (Devices would have to meet to find
    the largest of ``left``.)

    ``conditioning``, ``inputs``, ``positions``: of the prompt, and of the negative one, which ``cfg_scale`` ``[B]``
    leads away from.
    ``noise``: that the latents began with, where what lies outside a mask is kept.
    The layers that make step inputs are in ``state`` but not in the program: jit drops what is not used.
    """
    # Each call embeds anew: a program of its own would save 0.6 % where two references have early blocks, else less.
    model: Denoiser = _model(graph, state, scales)
    model.drop_step_layers()
    embedded = [model.embed(each, places, dtype) for each, places in zip(conditioning, positions, strict=True)]
    references = pictures.references
    if references is not None:
        references = model.embed_references(references.astype(dtype), positions[0])

    def body(i: Array, x: Array) -> Array:
        read = _beside(x, pictures, dtype)

        def evaluate(prompt: tuple[Any, StepInputs, Positions]) -> Array:
            return model.velocity(read, *prompt, references)

        prompts = list(zip(embedded, (_at(each, i) for each in inputs), positions, strict=True))
        if cfg_scale is None:
            velocity = evaluate(prompts[0])
        elif _alike(prompts):
            # one after the other: the program has the blocks once, and works on no more than with one prompt
            positive, negative = jax.lax.map(evaluate, jax.tree.map(lambda *x: jnp.stack(x), *prompts))
            velocity = led(positive, negative, cfg_scale)
        else:  # texts of two lengths
            positive, negative = map(evaluate, prompts)
            velocity = led(positive, negative, cfg_scale)
        return _step(scheduler_step, x, velocity, i, sigmas, left, noise, pictures)

    return jax.lax.fori_loop(0, turns, body, latents)


def fresh_cache(graph: Graph, dtype: Any, state: State, latents: Latents) -> StepCache:
    """What ``denoise_cached`` begins with."""
    model: CachedDenoiser = nnx.merge(graph, state)
    return model.fresh_cache(latents, dtype)


def denoise_cached(
    scheduler_step: SchedulerStep, graph: Graph, dtype: Any, state: State, latents: Latents, cache: StepCache,
    conditioning: Conditioning, inputs: StepInputs, sigmas: Sigmas, left: Int[Array, " B"], turns: Count,
    positions: Positions, threshold: Float[Array, ""], noise: Latents | None, pictures: Pictures,
    scales: Scales | None = None,
) -> tuple[Latents, StepCache]:  # fmt: skip
    """``denoise`` of one prompt, without references, with a step cache, which goes on from call to call."""
    model: CachedDenoiser = _model(graph, state, scales)
    model.drop_step_layers()
    embedded = model.embed(conditioning, positions, dtype)

    def body(i: Array, carry: tuple[Array, StepCache]) -> tuple[Array, StepCache]:
        x, cache = carry
        read = _beside(x, pictures, dtype)
        velocity, cache = model.cached_velocity(read, embedded, _at(inputs, i), positions, cache, threshold, i < left)
        return _step(scheduler_step, x, velocity, i, sigmas, left, noise, pictures), cache

    return jax.lax.fori_loop(0, turns, body, (latents, cache))


def _beside(latents: Latents, pictures: Pictures, dtype: Any) -> Float[Array, "B L _"]:
    """The latents, and beside their channels those of a control map or a hole."""
    channels = [latents] if pictures.channels is None else [latents, pictures.channels]
    return jnp.concatenate(channels, -1).astype(dtype)


def _alike(pytrees: Sequence[Any]) -> bool:
    """Whether all have arrays of the same shapes."""
    return len({tuple(x.shape for x in jax.tree.leaves(tree)) for tree in pytrees}) == 1


def _at(inputs: StepInputs, i: Count) -> StepInputs:
    """The inputs of one step."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), inputs)


def _step(
    scheduler_step: SchedulerStep, x: Latents, velocity: Latents, i: Count, sigmas: Sigmas, left: Int[Array, " B"],
    noise: Latents | None, pictures: Pictures,
) -> Latents:  # fmt: skip
    """Latents a step on. Outside a mask they are the start picture with its share of noise."""
    moved = scheduler_step(x, velocity, sigmas[:, i], sigmas[:, i + 1])
    if pictures.mask is not None:
        assert noise is not None
        kept = begin(noise, pictures, sigmas[:, i + 1, None])
        moved = pictures.mask * moved + (1 - pictures.mask) * kept
    return jnp.where((i < left)[:, None, None], moved, x)


# The same in parts, for blocks that come one at a time.


def step_vector(
    graph: Graph, dtype: Any, state: State, conditioning: Conditioning, sigmas: Sigmas, guidance: PerRow
) -> tuple[Any, Any]:
    model: StreamedDenoiser = nnx.merge(graph, state)
    return model.step_vector(conditioning, sigmas, guidance, dtype)


def step_layer(graph: Graph, state: State, vector: Any) -> Array:
    return nnx.merge(graph, state)(vector)


def embed(
    graph: Graph, dtype: Any, state: State, latents: Latents, conditioning: Conditioning, positions: Positions,
    still: Mapping[str, Any], pictures: Pictures,
) -> Any:  # fmt: skip
    """What the first block reads. ``still``: fields of it that a step before has made for all."""
    model: StreamedDenoiser = nnx.merge(graph, state)
    x = latents if pictures.channels is None else jnp.concatenate([latents, pictures.channels], -1)
    x = x if pictures.references is None else jnp.concatenate([x, pictures.references], 1)
    tokens = model.embed_tokens(x, conditioning, positions, dtype)
    return tokens._replace(**still) if still else tokens


def block(
    block_graph: Graph,
    graph: Graph,
    block: State,
    state: State,
    x: Any,
    inputs: Sequence[Array],
    shared: Any,
    i: Count,
    positions: Positions,
) -> Any:
    """``inputs``: what the block's step layers made, ``shared``: what all blocks read; both of all steps."""
    model: StreamedDenoiser = nnx.merge(graph, state)
    own = [part[:, i] for part in inputs]
    return model.block(nnx.merge(block_graph, block), x, own, _at(shared, i), positions)


def step(
    scheduler_step: SchedulerStep, graph: Graph, state: State, latents: Latents, x: Sequence[Any],
    shared: Sequence[Any], i: Count, sigmas: Sigmas, left: Int[Array, " B"], cfg_scale: PerRow | None,
    noise: Latents | None, pictures: Pictures,
) -> Latents:  # fmt: skip
    """``x``, ``shared``: of the prompt, and of the negative one."""
    model: StreamedDenoiser = nnx.merge(graph, state)
    velocities = [model.finish(each, _at(own, i))[:, : latents.shape[1]] for each, own in zip(x, shared, strict=True)]
    velocity = velocities[0] if cfg_scale is None else led(velocities[0], velocities[1], cfg_scale)
    return _step(scheduler_step, latents, velocity, i, sigmas, left, noise, pictures)


def encode_pictures(
    family: Family, graph: Graph, dtype: Any, state: State, arrays: Mapping[str, Float[Array, "B ..."]], at_once: int
) -> Pictures:
    """What the denoiser reads of the pictures of a batch's rows. A device encodes as many rows together as have
    ``at_once`` pixels."""
    vae = nnx.merge(graph, gathered(state, nnx.merge(graph, state).layout))  # whole weights, as in ``decode``
    mesh = vae.layout.mesh
    ways = 1 if mesh is None else data_parallel_size_of(mesh)
    rows = len(next(iter(arrays.values())))
    pixels = sum(math.prod(x.shape[1:3]) for x in arrays.values() if x.shape[-1] == 3)
    count = together(rows // ways, pixels, 1, at_once)
    return _in_turns(lambda x: family.encode_pictures(vae, x, dtype), dict(arrays), ways, count)


def decode(
    family: Family, graph: Graph, dtype: Any, state: State, latents: Latents, height: int, width: int, at_once: int
) -> tuple[UInt8[Array, "B {height} {width} 3"], Bool[Array, " B"]]:
    """Latents ``[B, L, C]`` → uint8 pictures ``[B, height, width, 3]``, and whether each is finite.

    Non-finite pictures of finite latents are decoded once more in float32. A device decodes as many together as have
    ``at_once`` pixels.
    """
    # Whole weights: the compiler would divide convolutions by channels too, on some meshes wrongly (jax 0.10).
    vae = nnx.merge(graph, gathered(state, nnx.merge(graph, state).layout))
    mesh = vae.layout.mesh

    def pictures(grid: Array) -> tuple[Array, Array]:
        def picture(dtype: Any) -> Array:
            return vae(grid.astype(dtype)).astype(jnp.float32)

        image = picture(dtype)
        if dtype != jnp.float32:
            again = jnp.all(jnp.isfinite(grid), axis=(1, 2, 3)) & ~jnp.all(jnp.isfinite(image), axis=(1, 2, 3))
            second = jax.lax.cond(jnp.any(again), lambda: picture(jnp.float32), lambda: image)
            image = jnp.where(again[:, None, None, None], second, image)
        finite = jnp.all(jnp.isfinite(image), axis=(1, 2, 3)) & jnp.all(jnp.isfinite(grid), axis=(1, 2, 3))
        pixels = jnp.round(jnp.clip(image * 0.5 + 0.5, 0, 1) * 255)
        return jnp.where(finite[:, None, None, None], pixels, 0).astype(jnp.uint8), finite

    ways = 1 if mesh is None else data_parallel_size_of(mesh)
    return _in_turns(
        pictures, family.unpack(latents, height, width), ways, together(len(latents) // ways, height, width, at_once)
    )


def compiler_options(platform: str, weights: Any) -> Mapping[str, str] | None:
    """What the compiler is told for all programs but ``decode``. ``weights``: their dtype."""
    return _CPU_STACKS if platform == "cpu" and weights == jnp.bfloat16 else None


def decoder_options(platform: str, channels: int) -> Mapping[str, str] | None:
    """What the compiler is told for ``decode`` alone. ``channels``: of the decoder's last level, the fewest."""
    if platform == "cpu" and channels < _NARROW:
        return {_YNN: ""}
    if platform == "cpu" and _stops_at_avx2():
        return {_YNN: _SUMS}
    return _TPU_OPTIONS if platform == "tpu" else None


@functools.cache
def _stops_at_avx2() -> bool:
    """Whether this CPU has AVX2 and is known to have no AVX-512."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux
        return False
    return "avx2" in words and "avx512f" not in words


def pixels_at_once(platform: str) -> int:
    """Of pictures that one device decodes."""
    return _TOGETHER_ON_A_CPU if platform == "cpu" else _TOGETHER


def together(images: int, height: int, width: int, pixels: int) -> int:
    """How many of a device's pictures of a batch are decoded at once, if at most so many ``pixels`` are."""
    most = max(1, pixels // (height * width))
    return max(count for count in range(1, min(images, most) + 1) if images % count == 0)


def _in_turns(function: Callable[[Any], Any], arrays: Any, ways: int, count: int) -> Any:
    """``function`` of ``arrays`` ``[B, …]``, which are dealt over ``ways`` devices, ``count`` of each one's at a
    time."""
    turns = len(jax.tree.leaves(arrays)[0]) // (ways * count)
    if turns == 1:
        return function(arrays)

    def in_order(x: Array) -> Array:
        return x.reshape(ways, turns, count, *x.shape[1:]).swapaxes(0, 1).reshape(turns, -1, *x.shape[1:])

    first = jax.tree.map(in_order, arrays)
    back = lambda y: y.reshape(turns, ways, count, *y.shape[2:]).swapaxes(0, 1).reshape(-1, *y.shape[2:])  # noqa: E731
    return jax.tree.map(back, jax.lax.map(function, first))
