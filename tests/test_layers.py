"""What the models are made of, against the same written plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fluxbatch.models.clip import ClipConfig, ClipTextEncoder
from fluxbatch.models.flux import Flux, FluxConfig
from fluxbatch.models.layers import Conv
from fluxbatch.models.t5 import T5Config, T5Encoder
from fluxbatch.models.vae import Decoder, VaeConfig


def conv(size, **options):
    module = Conv(6, 5, size, rngs=nnx.Rngs(0), **options)
    module.bias[...] = jnp.arange(5.0)
    return module, jax.random.normal(jax.random.key(1), (2, 7, 4, 6))


def plain(module, x, padding):
    """In float64, pixel by pixel."""
    kernel, x = np.asarray(module.kernel[...], np.float64), np.pad(np.asarray(x, np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size = kernel.shape[2]
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return np.einsum("bhwcij,ocij->bhwo", windows, kernel) + np.asarray(module.bias[...])


@pytest.mark.parametrize("size", [1, 3])
def test_convolution(size):
    module, x = conv(size)
    assert np.abs(np.asarray(module(x)) - plain(module, x, size // 2)).max() < 1e-5


def test_convolution_of_doubled_pixels():
    module, x = conv(3)
    expected = plain(module, x.repeat(2, axis=1).repeat(2, axis=2), 1)
    assert module.of_doubled(x).shape == (2, 14, 8, 5)
    assert np.abs(np.asarray(module.of_doubled(x)) - expected).max() < 1e-5
    # sums over the kernel are rounded once, so bfloat16 is as near as it is without them
    half = np.asarray(module.of_doubled(x.astype(jnp.bfloat16)), np.float64)
    usual = np.asarray(module(x.astype(jnp.bfloat16).repeat(2, axis=1).repeat(2, axis=2)), np.float64)
    assert np.sqrt(np.mean((half - expected) ** 2)) < 1.2 * np.sqrt(np.mean((usual - expected) ** 2))


MODELS = {
    "flux": lambda rngs: Flux(FluxConfig(4, 4, 2, 3, 8, 2, 16, 8, True, (2, 2, 4)), rngs=rngs),
    "t5": lambda rngs: T5Encoder(T5Config(32, 16, 8, 32, 2, 2, 32, 128, 1e-6), rngs=rngs),
    "clip": lambda rngs: ClipTextEncoder(ClipConfig(32, 16, 32, 2, 2, 8, "quick_gelu", 1e-5, 2), rngs=rngs),
    "vae": lambda rngs: Decoder(VaeConfig(4, (8, 16), 1, 4, 1.0, 0.0, True, True, True), rngs=rngs),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_values_has_the_shapes_of_one_with_them(name):
    graph, state = nnx.split(MODELS[name](None))
    real_graph, real = nnx.split(MODELS[name](nnx.Rngs(0)), nnx.Param, ...)[:2]
    parameters = lambda state: [(keys, leaf.get_value().shape, leaf.get_value().dtype, leaf.get_metadata()["axes"]) for keys, leaf in nnx.to_flat_state(state)]  # noqa: E731
    assert parameters(state) == parameters(real)
    assert str(jax.tree.structure(nnx.merge(graph, real))) == str(jax.tree.structure(nnx.merge(real_graph, real)))
