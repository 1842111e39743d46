"""The plan: figures of the models, of machines, and of a job before it runs."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from fluxbatch import chips, flops
from fluxbatch.models.clip import ClipConfig
from fluxbatch.models.flux import Flux, FluxConfig
from fluxbatch.models.t5 import T5Config
from fluxbatch.models.vae import Decoder, VaeConfig
from fluxbatch.types import UserError

DEV = FluxConfig(64, 64, 19, 38, 24, 128, 4096, 768, True, (16, 56, 56))
T5XXL = T5Config(32128, 4096, 64, 10240, 24, 64, 32, 128, 1e-6)
CLIP_L = ClipConfig(49408, 768, 3072, 12, 12, 77, "quick_gelu", 1e-5, 2)
VAE = VaeConfig(16, (128, 256, 512, 512), 2, 32, 0.3611, 0.1159, True, False, False)
T = 1e12


@pytest.mark.parametrize(("text", "linear", "attention", "step"), [(512, 59.5, 14.9, 74.4), (256, 56.2, 13.3, 69.5)])
def test_flops_of_flux_at_1024(text, linear, attention, step):
    assert round(flops.flux_linear(DEV, 4096, text) / T, 1) == linear
    assert round(flops.flux_attention(DEV, 4096, text) / T, 1) == attention
    assert round(flops.flux_step(DEV, 4096, text) / T, 1) == step


def test_flops_of_the_rest():
    assert flops.vae_decode(VAE, 1024, 1024) / T == pytest.approx(10.4, abs=0.1)
    assert flops.t5(T5XXL, 512) / T == pytest.approx(4.845, abs=0.001)
    assert flops.clip(CLIP_L, 77) / T == pytest.approx(0.0134, rel=0.05)


@pytest.mark.parametrize(
    ("name", "chip", "count", "hosts", "topology"),
    [("v6e-4", "v6e", 4, 1, "2x2"), ("v4-8", "v4", 4, 1, "2x2x1"), ("v5e-4", "v5e", 4, 1, "2x2"), ("v5p-8", "v5p", 4, 1, "2x2x1"),
     ("v6e-8", "v6e", 8, 1, "2x4"), ("v6e-16", "v6e", 16, 4, "4x4"), ("v5p-32", "v5p", 16, 4, "2x2x4"), ("H100", "h100", 1, 1, None),
     ("2xh100-8", "h100", 16, 2, None), ("a100-40gb-2", "a100-40gb", 2, 1, None), ("4090", "4090", 1, 1, None)],
)  # fmt: skip
def test_targets(name, chip, count, hosts, topology):
    target = chips.target(name)
    assert (target.chip.name, target.chips, target.hosts, target.topology) == (chip, count, hosts, topology)


@pytest.mark.parametrize("name", ["v6e", "v6e-3", "v4-7", "h100-9", "0xh100", "h101", "2xv6e-4", "", "cpu-2"])
def test_targets_that_do_not_exist(name):
    if name == "v6e":
        assert chips.target(name).chips == 1
        return
    with pytest.raises(UserError, match=f"target={name}: expected"):
        chips.target(name)


def test_chips_by_the_name_that_jax_gives_them():
    found = {kind: chips.of_kind(kind) for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "TPU v5 lite",
             "TPU v5", "TPU v6 lite", "TPU v4", "NVIDIA L40S", "NVIDIA L4", "cpu")}  # fmt: skip
    assert [chip and chip.name for chip in found.values()] == ["h100", "a100", "a100-40gb", "v5e", "v5p", "v6e", "v4", "l40s", "l4", None]


def counted(module, *arrays):
    """What the compiler counts; of a scan it counts the body once."""
    graph, state = nnx.split(nnx.eval_shape(module))
    return jax.jit(lambda state, *a: nnx.merge(graph, state)(*a)).lower(state, *arrays).cost_analysis()["flops"]


def test_flops_against_the_compilers_count():
    flux = dataclasses.replace(DEV, num_layers=1, num_single_layers=1, num_attention_heads=4)
    shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731
    inputs = shape(1, 1024, 64), shape(1, 128, 4096), shape(1, 768), shape(1), shape(1), (shape(1152, 64), shape(1152, 64))
    assert counted(lambda: Flux(flux, rngs=nnx.Rngs(0)), *inputs) == pytest.approx(flops.flux_step(flux, 1024, 128), rel=0.02)
    assert counted(lambda: Decoder(VAE, rngs=nnx.Rngs(0)), shape(1, 44, 44, 16)) == pytest.approx(flops.vae_decode(VAE, 352, 352), rel=0.02)
