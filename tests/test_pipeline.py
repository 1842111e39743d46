"""The programs. Denoising, with modulation made before: as the plain steps, and without the weights that made it.
Decoding: non-finite pictures are made again in float32, and only they."""

import functools
import itertools
from concurrent.futures import Future
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from conftest import filled
from flax import nnx

from fluxbatch.distributed.mesh import Layout, make_mesh
from fluxbatch.generation import pipeline, programs
from fluxbatch.generation.steps import STEPS
from fluxbatch.models.autoencoder import Decoder, VaeConfig
from fluxbatch.models.flux1.definition import Flux1, PromptEmbeds
from fluxbatch.models.flux1.transformer import Flux, FluxConfig, rope_table, timestep_embedding
from fluxbatch.models.network import Pictures
from fluxbatch.models.schedulers import FlowMatchEuler
from fluxbatch.types import PLAIN
from fluxbatch.weights.precision import Precision

FLUX = FluxConfig(16, 16, 2, 3, 4, 16, 24, 16, True, (4, 6, 6))


class Loaded:
    """A network whose weights are there."""

    missing, here, dtype = 0, True, Precision.of(np.float32)

    def __init__(self, module):
        self._parts = nnx.split(module)

    def load(self, progress):
        pass

    def parts(self):
        return self._parts


@pytest.fixture(scope="module")
def flux():
    return filled(Flux(FLUX, rngs=None))


def test_steps_with_modulation_made_before_are_the_plain_steps(flux):
    """More steps than are prepared at a time; rows of a batch with other counts, one of them a single step."""
    schedule = FlowMatchEuler.of({"use_dynamic_shifting": True}, None, None, None)
    networks = {"transformer": Loaded(flux), "vae": Loaded(decoder_module())}
    whole = pipeline.Pipeline(family(), networks, make_mesh((1, 1)), "float32", schedule, pipeline.ProgressObserver())
    counts = (2 * STEPS + 3, 1, STEPS)
    rows = [
        plain.row(i, height=12, width=8, num_inference_steps=n, guidance_scale=float(i)) for i, n in enumerate(counts)
    ]
    rng = np.random.default_rng(2)
    text, pooled = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 24), (3, 16)))
    found = np.asarray(whole.denoise(rows, [PromptEmbeds(text, pooled)]))
    assert whole._denoise._cache_size() == whole._step_inputs._cache_size() == 1
    velocity = jax.jit(flux)
    rope = rope_table(5, 3, 2, FLUX.axes_dims_rope)
    for i, row in enumerate(rows):
        x, sigmas = family().noise(row.seed, 12, 8)[None], schedule.sigmas(counts[i], 6)
        for now, then in itertools.pairwise(sigmas):
            one = text[i : i + 1], pooled[i : i + 1], np.array([now]), np.array([row.guidance_scale], np.float32)
            x = x + (then - now) * np.asarray(velocity(x, *one, rope))
        assert np.allclose(found[i], x[0], atol=2e-5 * np.abs(x).max())


class Waits(pipeline.ProgressObserver):
    """What happens, in order; drawing stands for programs that were launched."""

    def __init__(self):
        self.seen = []

    def compiling(self):
        self.seen.append("compiling")
        return super().compiling()

    def launched(self, since, outputs, pictures):
        self.seen.append("drawing" if pictures else "encoding")


def test_a_wait_for_the_decoder_is_no_work_of_the_denoiser(flux):
    networks, observer = {"transformer": Loaded(flux), "vae": Loaded(decoder_module())}, Waits()
    schedule = FlowMatchEuler.of({"use_dynamic_shifting": True}, None, None, None)
    one = pipeline.Pipeline(family(), networks, make_mesh((1, 1)), "float32", schedule, observer)
    compiled = Future()
    compiled.set_result([])
    one._compiled = {("denoise", 12, 8, PLAIN): compiled, ("decode", 12, 8): compiled}
    row = plain.row(0, height=12, width=8, num_inference_steps=1)
    latents = one.denoise([row], [PromptEmbeds(np.zeros((1, 5, 24), np.float32), np.zeros((1, 16), np.float32))])
    one.decode(latents, 12, 8)
    assert observer.seen == ["compiling", "drawing", "compiling", "drawing"]


def test_denoising_does_not_receive_the_weights_that_make_modulation(flux):
    graph, state = nnx.split(flux)
    size = lambda layers: sum(x.nbytes for layer in layers for x in jax.tree.leaves(nnx.state(layer)))  # noqa: E731
    apart = size(
        [
            flux.double_blocks.img.mod,
            flux.double_blocks.txt.mod,
            flux.single_blocks.mod,
            flux.final_mod,
            flux.time_in,
            flux.vector_in,
            flux.guidance_in,
        ]
    )
    shape = jax.ShapeDtypeStruct
    text = shape((2, 5, 24), "float32")
    sigmas, left, pooled, guidance = (
        shape((2, 9), "float32"),
        shape((2,), "int32"),
        shape((2, 16), "float32"),
        shape((2,), "float32"),
    )
    modulate = (
        jax.jit(functools.partial(programs.step_inputs, graph, jnp.dtype("float32")))
        .lower(state, PromptEmbeds(text, pooled), sigmas, guidance)
        .compile()
    )
    mod = modulate.out_info
    latents, rope = shape((2, 6, 16), "float32"), 2 * (shape((11, 8), "float32"),)
    denoise = (
        jax.jit(functools.partial(programs.denoise, FlowMatchEuler.step, graph, jnp.dtype("float32")))
        .lower(
            *(state, latents, [PromptEmbeds(text, pooled)], [mod], sigmas, left, jnp.int32(8), [rope]),
            *(None, None, Pictures()),
        )
        .compile()
    )
    given = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((latents, text, mod, sigmas, left, rope)))
    received = denoise.memory_analysis().argument_size_in_bytes
    assert apart > 0.25 * size([flux]) and denoise.out_info.shape == latents.shape
    assert abs(received - (size([flux]) - apart + given)) <= 64 * len(jax.tree.leaves(state))  # aligned


VAE = VaeConfig(4, (8, 8), 1, 4, 1.0, 0.0, False, False, False)


def family():
    return Flux1({"transformer": FLUX, "text_encoder": None, "text_encoder_2": None, "vae": VAE})


def decoder_module():
    return filled(Decoder(VAE, rngs=None))


def decoder():
    return nnx.split(decoder_module())


def decode(dtype, latents):
    graph, state = decoder()
    program = jax.jit(functools.partial(programs.decode, family(), graph, jnp.dtype(dtype)), static_argnums=(2, 3, 4))
    pixels, finite = program(state, latents, 16, 16, 1 << 20)
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


def test_large_pictures_are_decoded_a_few_at_a_time():
    """Each device's own, and what comes out is what they are all at once."""
    assert [programs.together(8, side, side, programs.pixels_at_once("tpu")) for side in (128, 256, 512, 1024)] == [
        8,
        4,
        1,
        1,
    ]
    assert programs.together(6, 256, 256, 4 * 256 * 256) == 3  # equal turns
    vae = filled(Decoder(VAE, rngs=None, layout=Layout(make_mesh([2]))))
    graph, state = nnx.split(vae)
    many = jax.random.normal(jax.random.key(0), (8, 16, 16)).at[5].multiply(1e6).at[6, 0, 0].set(jnp.nan)

    def run(pixels):
        program = (
            jax.jit(functools.partial(programs.decode, family(), graph, jnp.dtype("float16")), static_argnums=(2, 3, 4))
            .lower(state, many, 16, 16, pixels)
            .compile()
        )
        assert (
            "dim_labels=b01f_01io->b01f" in (text := program.as_text()) and "_oi01->" not in text
        )  # for the latter XLA:CPU has plain loops alone
        return [np.asarray(x) for x in program(state, many)], program.memory_analysis().temp_size_in_bytes

    (whole, finite), most = run(1 << 20)
    for pixels in (2 * 16 * 16, 1):
        (parts, parts_finite), least = run(pixels)
        assert np.abs(parts.astype(int) - whole).max() <= 1 and np.array_equal(
            parts_finite, finite
        )  # other shapes round otherwise
    assert finite.tolist() == [True] * 6 + [False, True] and whole[5].std() > 0
    assert least < 0.6 * most


def test_times_are_float32_whatever_the_activations_are(flux):
    """Two times that bfloat16 cannot tell apart, and angles of up to 1,000 radians."""
    times = np.float32([0.7510, 0.7513])
    assert len({float(t) for t in jnp.asarray(times, jnp.bfloat16)}) == 1
    angles = 1000.0 * times.astype(np.float64)[:, None] * np.exp(-np.log(10_000) * np.arange(128) / 128)
    exact = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    assert np.abs(np.asarray(timestep_embedding(jnp.asarray(times))) - exact).max() < 2e-4
    vec = flux._vector(jnp.zeros((1, FLUX.pooled_projection_dim)), jnp.asarray(times)[None], jnp.ones(1), jnp.bfloat16)
    assert vec.dtype == jnp.bfloat16 and not np.array_equal(*np.asarray(vec[0], np.float32))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("sse2 avx2 fma", "LIBRARY_FUSION_TYPE_REDUCE"), ("avx2 avx512f", None), ("asimd sve", None)],
)
def test_who_convolves_on_a_cpu(monkeypatch, flags, expected):
    """Of a wide decoder; a narrow one's convolutions are XLA's everywhere."""
    monkeypatch.setattr(Path, "read_text", lambda path: f"flags\t: fpu {flags} sse")
    programs._stops_at_avx2.cache_clear()
    try:
        for channels, wanted in ((8, ""), (64, expected)):
            options = programs.decoder_options("cpu", channels)
            assert (options or {}).get("xla_cpu_experimental_ynn_fusion_type") == wanted
    finally:
        programs._stops_at_avx2.cache_clear()
