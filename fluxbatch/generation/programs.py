"""What the devices run, as pure functions of arrays: text → states, latents a step on, latents → pixels.

``graph`` is a network's definition and ``state`` its parameters, as ``nnx.split`` gives them; ``scales`` are those of each
row's adapters. ``pipeline.py`` compiles them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxbatch.distributed.mesh import batch_ways
from fluxbatch.generation import sampling
from fluxbatch.models.autoencoder import VaeConfig
from fluxbatch.models.flux1.transformer import DoubleBlock
from fluxbatch.models.layers import gathered, set_rows

# XLA:CPU leaves products, convolutions and sums to a library, YNNPACK. On a CPU without AVX-512 (EPYC) its convolutions are
# slower than XLA's: the decoder of the bench's middle takes 6.3 s with them and 5.3 without; with AVX-512 (Xeon) 2.2 and 2.3.
# Over flux-mini's 12 channels it gains nothing, and its first run took as long as two more.
_NARROW = 16
_YNN, _SUMS = "xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_REDUCE"
# libtpu looks longer for the tiles of a convolution the more room they have: a decoder of 256×256 is compiled in 68 s with
# this, and not within 220 s with what conf/hardware gives the transformer. (Which of the two runs faster was not compared.)
_TPU_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "16384"}
# A device decodes pictures together as long as they have no more pixels than this: beyond it each would take
# memory of its own, and on a CPU leave its caches.
_TOGETHER, _TOGETHER_ON_A_CPU = 512 * 512, 2 * 128 * 128


def _model(graph, state, scales=None):
    model = nnx.merge(graph, state)
    return model if scales is None else set_rows(model, scales)


def encode(clip_graph, t5_graph, dtype, clip, t5, clip_ids, t5_ids, scales=None):
    pooled = _model(clip_graph, clip, scales)(clip_ids, dtype)
    return _model(t5_graph, t5, scales)(t5_ids, dtype), pooled


def modulate(graph, dtype, state, pooled, sigmas, guidance, scales=None):
    """All that ``denoise`` needs of time, guidance and pooled text, and of the weights that it can do without."""
    flux = _model(graph, state, scales)
    return flux.modulation(flux.condition(pooled, sigmas[:, :-1], guidance, dtype))


def denoise(graph, dtype, state, latents, text, mod, sigmas, left, turns, rope, scales=None):
    """As many Euler steps as ``turns``; a row that has none ``left`` stands still. (Devices would have to meet to find
    the largest of ``left``.)

    The layers that make modulation are in ``state`` but not in the program: jit drops what is not used.
    """
    flux = _model(graph, state, scales)
    flux.drop_modulators()
    text = flux.embed_text(text, dtype)
    step = lambda i, x: _euler(x, flux.velocity(x.astype(dtype), text, mod.at(i), rope), i, sigmas, left)  # noqa: E731
    return jax.lax.fori_loop(0, turns, step, latents)


def _euler(x, velocity, i, sigmas, left):
    moved = x + (sigmas[:, i + 1] - sigmas[:, i])[:, None, None] * velocity.astype(jnp.float32)
    return jnp.where((i < left)[:, None, None], moved, x)


# The same in parts, for blocks that come one at a time.


def condition(graph, dtype, state, pooled, sigmas, guidance):
    flux = nnx.merge(graph, state)
    vec = flux.condition(pooled, sigmas[:, :-1], guidance, dtype)
    return vec, flux.modulation(vec).final


def layer(graph, state, vec):
    return nnx.merge(graph, state)(vec)


def embed(graph, dtype, state, latents, text):
    flux = nnx.merge(graph, state)
    return flux.embed_image(latents.astype(dtype)), flux.embed_text(text, dtype)


def block(block_graph, graph, block, state, x, mod, i, rope):
    """``x``: image and text; in single blocks one sequence of both, text first. ``mod``: of all steps."""
    block, flux = nnx.merge(block_graph, block), nnx.merge(graph, state)
    img, txt = x
    mod = [part[:, i] for part in mod]
    if isinstance(block, DoubleBlock):
        return block(x, mod, rope, flux)
    both = block(jnp.concatenate([txt, img], axis=1), *mod, rope, flux)
    return both[:, txt.shape[1] :], both[:, : txt.shape[1]]


def step(graph, state, latents, x, final, i, sigmas, left):
    return _euler(latents, nnx.merge(graph, state).finish(x[0], final[:, i]), i, sigmas, left)


def decode(graph, dtype, state, latents, height, width, at_once):
    """Non-finite pictures of finite latents are decoded once more in float32. A device decodes as many together as have
    ``at_once`` pixels."""
    # Whole weights: the compiler would divide convolutions by channels too, on some meshes wrongly (jax 0.10).
    vae = nnx.merge(graph, gathered(state, nnx.merge(graph, state).layout))
    scale, mesh = vae.cfg.scale, vae.layout.mesh

    def pictures(grid):
        picture = lambda dtype: vae(grid.astype(dtype)).astype(jnp.float32)  # noqa: E731
        image = picture(dtype)
        if dtype != jnp.float32:
            again = jnp.all(jnp.isfinite(grid), axis=(1, 2, 3)) & ~jnp.all(jnp.isfinite(image), axis=(1, 2, 3))
            second = jax.lax.cond(jnp.any(again), lambda: picture(jnp.float32), lambda: image)
            image = jnp.where(again[:, None, None, None], second, image)
        finite = jnp.all(jnp.isfinite(image), axis=(1, 2, 3)) & jnp.all(jnp.isfinite(grid), axis=(1, 2, 3))
        pixels = jnp.round(jnp.clip(image * 0.5 + 0.5, 0, 1) * 255)
        return jnp.where(finite[:, None, None, None], pixels, 0).astype(jnp.uint8), finite

    ways = 1 if mesh is None else batch_ways(mesh)
    return _in_turns(pictures, sampling.unpack(latents, height, width), ways, together(len(latents) // ways, scale * height, scale * width, at_once))


def decoder_options(platform: str, vae: VaeConfig) -> Mapping[str, str] | None:
    """What the compiler is told for ``decode`` alone."""
    if platform == "cpu" and vae.block_out_channels[0] < _NARROW:
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


def _in_turns(function: Callable[[jax.Array], Any], x: jax.Array, ways: int, count: int) -> Any:
    """``function`` of ``x`` ``[B, …]``, which is dealt over ``ways`` devices, ``count`` of each one's at a time."""
    turns = len(x) // (ways * count)
    if turns == 1:
        return function(x)
    first = x.reshape(ways, turns, count, *x.shape[1:]).swapaxes(0, 1).reshape(turns, -1, *x.shape[1:])
    back = lambda y: y.reshape(turns, ways, count, *y.shape[2:]).swapaxes(0, 1).reshape(-1, *y.shape[2:])  # noqa: E731
    return jax.tree.map(back, jax.lax.map(function, first))
