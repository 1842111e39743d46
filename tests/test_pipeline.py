"""The decode program: non-finite pictures are made again in float32, and only they."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch import pipeline
from fluxbatch.models.vae import Decoder, VaeConfig


def decoder():
    config = VaeConfig(4, (8, 8), 1, 4, 1.0, 0.0, False, False, False)
    return nnx.split(Decoder(config, rngs=nnx.Rngs(0)))


def decode(dtype, latents):
    graph, state = decoder()
    program = jax.jit(functools.partial(pipeline._decode, graph, jnp.dtype(dtype)), static_argnums=(2, 3))
    pixels, finite = program(state, latents, 8, 8)
    return np.asarray(pixels), np.asarray(finite)


def latents(factor=1e6):
    """Three images: one that float16 cannot hold, a plain one, one that is lost already."""
    plain = jax.random.normal(jax.random.key(0), (3, 16, 16))
    return plain.at[0].multiply(factor).at[2, 3, 3].set(jnp.nan)


def test_what_half_precision_cannot_hold_is_decoded_in_float32():
    half, finite = decode("float16", latents())
    full, _ = decode("float32", latents())
    beside_plain, _ = decode("float16", latents(factor=1.0))
    assert finite.tolist() == [True, True, False]
    assert np.array_equal(half[0], full[0]) and half[0].std() > 0
    assert np.array_equal(half[1], beside_plain[1])  # its neighbour's second decode does not touch it
    assert half[2].max() == 0  # never written: the writer sets it aside


def test_without_the_second_decode_it_would_be_lost():
    graph, state = decoder()
    grid = latents()[:1].reshape(1, 4, 4, 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(1, 8, 8, 4)
    assert not np.isfinite(np.asarray(nnx.merge(graph, state)(grid.astype(jnp.float16)))).all()
