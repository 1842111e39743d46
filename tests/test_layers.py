"""What the models are made of, against the same written plainly."""

import functools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conftest import filled
from flax import nnx

from fluxbatch.models.autoencoder import Decoder, VaeConfig
from fluxbatch.models.convolutions import Conv, GroupNorm
from fluxbatch.models.dit import led, rotate, rotated_by_halves, rotated_by_product
from fluxbatch.models.flux1.clip import ClipConfig, ClipTextEncoder
from fluxbatch.models.flux1.t5 import T5Config, T5Encoder
from fluxbatch.models.flux1.transformer import Flux, FluxConfig, rope_table
from fluxbatch.models.layers import Linear, from_heads, layer_norm, norm_in_one_reading, side_by_side, transposed


def conv(size, **options):
    module = Conv(6, 5, size, rngs=nnx.Rngs(0), **options)
    module.bias[...] = jnp.arange(5.0)
    return module, jax.random.normal(jax.random.key(1), (2, 7, 4, 6))


def plain(module, x, padding):
    """In float64, pixel by pixel."""
    kernel, x = (
        np.asarray(module.kernel[...], np.float64),
        np.pad(np.asarray(x, np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0))),
    )
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


def test_pictures_in_bands():
    """As a TPU works on them: each band sees a row of its neighbours, and a norm all bands of a picture."""
    module, x = conv(3)
    x = jnp.concatenate([x, x[:, :5] ** 2], axis=1)  # 12 rows
    banded = x.reshape(2, 4, 3, 4, 6)
    for by in (module, module.of_doubled, GroupNorm(6, 3, eps=1e-6, rngs=nnx.Rngs(0))):
        expected = np.asarray(by(x))
        assert np.abs(np.asarray(by(banded)).reshape(expected.shape) - expected).max() < 1e-5
    cfg = VaeConfig(4, (8, 16), 1, 4, 1.0, 0.0, True, True, True)
    latents = jax.random.normal(jax.random.key(1), (2, 12, 6, 4))
    whole, bands = (jax.jit(filled(Decoder(cfg, rngs=None, bands=bands))) for bands in (1, 8))
    assert (
        "conv_general_dilated" in (program := str(jax.make_jaxpr(bands)(latents))) and "f32[8,5,6,16]" in program
    )  # 4 bands of 3 rows, and 2
    assert np.abs(np.asarray(bands(latents)) - np.asarray(whole(latents))).max() < 1e-5
    alone = [str(jax.make_jaxpr(by.__wrapped__)(latents[:, :7])) for by in (whole, bands)]
    assert alone[0] == alone[1] and "conv_general_dilated" in alone[0]  # seven rows have no bands


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_a_tpu_does_in_its_own_way_is_the_same(dtype):
    """Bit by bit: its exchange of halves is exact, and nothing else differs."""
    x = jax.random.normal(jax.random.key(2), (2, 3, 23, 128)).astype(dtype)
    rope = rope_table(3, 4, 5, (16, 56, 56))
    expected = rotated_by_halves(x, *rope)
    turned = np.asarray(x, np.float64)[..., :64] + 1j * np.asarray(x, np.float64)[..., 64:]
    turned = turned * (rope[0] + 1j * rope[1])
    turned = np.concatenate([turned.real, turned.imag], -1)
    rounding = (0 if dtype == jnp.float32 else 2**-8) * np.abs(turned)  # half a unit in the last place, at most
    assert np.all(np.abs(turned - np.asarray(expected, np.float64)) <= rounding + 1e-6)
    assert np.array_equal(rotated_by_product(x, *rope), expected) and np.array_equal(rotate(x, rope), expected)
    assert np.array_equal(side_by_side(x), transposed(x)) and np.array_equal(from_heads(x), transposed(x))


def test_a_bias_is_added_in_float32():
    """As near to the sum in float64 as bfloat16 can be, and a product that XLA:GPU gives no epilogue."""
    y, bias = (jax.random.normal(jax.random.key(i), (512,)) for i in range(2))
    linear = Linear(1, 512, (None, None), rngs=nnx.Rngs(0))
    linear.kernel[...], linear.bias[...] = y[:, None], bias
    half = np.asarray(linear(jnp.ones((1, 1), jnp.bfloat16))[0], np.float64)
    exact = np.asarray(y.astype(jnp.bfloat16), np.float64) + np.asarray(bias, np.float64)
    assert np.abs(half - exact).max() <= 2**-8 * np.abs(exact).max()
    assert np.array_equal(half, np.asarray(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16), np.float64))


def test_half_precision_on_a_cpu_is_read_as_it_lies():
    """XLA:CPU has no product into bfloat16 that is fast, and would make layers float32 as it takes them of a stack."""
    model = Flux(FluxConfig(4, 4, 2, 3, 2, 8, 16, 8, True, (2, 2, 4)), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    x = [jnp.ones(shape, jnp.bfloat16) for shape in ((1, 6, 4), (1, 5, 16), (1, 8))]
    rope = rope_table(5, 2, 3, (2, 2, 4))
    program = jax.jit(lambda state, *x: nnx.merge(graph, state)(*x, jnp.ones(1), jnp.ones(1), rope))
    hlo = program.lower(state, *x).compile().as_text()
    taken = [*re.findall(r"= (\w+)\[\S* dynamic-slice\(", hlo)]
    assert len(taken) > 20 and "f32" not in taken, taken
    assert set(re.findall(r"= (\w+)\[\S* dot\(", hlo)) == {"f32"}


MODELS = {
    "flux": lambda rngs: Flux(FluxConfig(4, 4, 2, 3, 8, 2, 16, 8, True, (2, 2, 4)), rngs=rngs),
    "t5": lambda rngs: T5Encoder(T5Config(32, 16, 8, 32, 2, 2, 32, 128, 1e-6), rngs=rngs),
    "clip": lambda rngs: ClipTextEncoder(ClipConfig(32, 16, 32, 2, 2, 8, "quick_gelu", 1e-5, 2), rngs=rngs),
    "vae": lambda rngs: Decoder(VaeConfig(4, (8, 16), 1, 4, 1.0, 0.0, True, True, True), rngs=rngs),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_values_has_the_shapes_of_one_with_them(name):
    graph, state = nnx.split(MODELS[name](None))
    real_graph, real = nnx.split(nnx.eval_shape(lambda: MODELS[name](nnx.Rngs(0))), nnx.Param, ...)[:2]

    def parameters(state):
        return [
            (keys, leaf.get_value().shape, leaf.get_value().dtype, leaf.get_metadata()["axes"])
            for keys, leaf in nnx.to_flat_state(state)
        ]

    assert parameters(state) == parameters(real)
    assert str(jax.tree.structure(nnx.merge(graph, real))) == str(jax.tree.structure(nnx.merge(real_graph, real)))


def test_shapes_that_annotations_name_are_checked():
    """By the hook in conftest.py, of which all tests of programs make use."""
    x, scale = jnp.ones((2, 3, 4)), jnp.ones(2)
    assert led(x, x, scale).shape == (2, 3, 4)
    with pytest.raises(jaxtyping.TypeCheckError, match="negative"):
        led(x, x[:, :2], scale)


@pytest.mark.parametrize("mean", [0, 1, 30])
def test_norm_of_half_precision_in_one_reading(mean):
    """Nearer to the norm in float64 than half a step of bfloat16, also where the mean is far larger than the rest."""
    x = jnp.asarray(mean + np.random.default_rng(0).normal(0, 1, (5, 3072)), jnp.bfloat16)
    y = np.asarray(x, np.float64)
    wanted = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    assert np.abs(norm_in_one_reading(x, eps=1e-6) - wanted).max() < 2**-9 * np.abs(wanted).max() / 4
    assert np.isfinite(norm_in_one_reading(jnp.full((1, 64), 1e4, jnp.bfloat16), eps=1e-6)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_is_the_plain_one(dtype):
    """As compiled for what is no TPU, in the program of a batch."""
    x = jnp.asarray(np.random.default_rng(1).normal(3, 2, (2, 5, 64)), dtype)
    y = np.asarray(x, np.float64)
    wanted = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    found = jax.jit(functools.partial(layer_norm, eps=1e-6))(x)
    assert found.dtype == jnp.float32 and np.allclose(found, wanted, atol=1e-5)
