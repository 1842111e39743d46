"""Block by block equals all at once."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_weights import plans

from fluxbatch.dist.mesh import make_mesh
from fluxbatch.models.flux import rope_table
from fluxbatch.pipeline import _denoise
from fluxbatch.weights import load
from fluxbatch.weights.stream import StreamedFlux


@pytest.mark.parametrize("variant,mesh", [("dev", (1, 4)), ("schnell", (1, 1))])
def test_streamed_steps_equal_loaded_ones(golden, variant, mesh):
    plan = plans(golden / variant)["transformer"]
    flux = load.load(plan, make_mesh((1, 1)), np.float32)
    rng = np.random.default_rng(0)
    latents, text, pooled = (rng.standard_normal(s).astype(np.float32) for s in ((2, 16, flux.cfg.in_channels), (2, 5, 32), (2, 32)))
    sigmas = np.array([[1, 0.7, 0.3, 0], [1, 0.5, 0, 0]], np.float32)
    rest = (text, pooled, sigmas, np.array([3, 2]), np.array([3.5, 1.0], np.float32), rope_table(5, 4, 4, flux.cfg.axes_dims_rope))
    expected = jax.jit(_denoise, static_argnums=(0, 1))(*(lambda g, s: (g, jnp.dtype("float32"), s))(*nnx.split(flux)), latents, *rest)
    streamed = StreamedFlux(plan, make_mesh(mesh), np.float32)
    rest = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in rest]
    got = streamed.denoise(jnp.asarray(latents), *rest, jnp.float32)
    assert np.abs(np.asarray(got) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_blocks_are_let_go(golden):
    """At any time the block in use, the next one, and none else."""
    streamed = StreamedFlux(plans(golden / "dev")["transformer"], make_mesh((1, 1)), np.float32)
    made = []
    load_one = streamed._load
    streamed._load = lambda *args: made.append(weakref.ref(module := load_one(*args))) or module
    kinds = []
    with streamed.blocks(2) as blocks:
        for block in blocks:
            kinds.append(type(block).__name__)
            gc.collect()
            assert sum(ref() is not None for ref in made) <= 2
    assert kinds == 2 * (["DoubleBlock"] * 2 + ["SingleBlock"] * 2)
