"""Every attention against the plain one; names that the hardware cannot serve are refused."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxbatch.models import attention


def qkv(b, h, l, k, m=None):
    keys = jax.random.split(jax.random.key(l), 3)
    return [jax.random.normal(key, (b, h, n, k)) for key, n in zip(keys, (l, m or l, m or l), strict=True)]


def reference(q, k, v, bias=0.0):
    """In float64, written out."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("l,m", [(7, 7), (96, 33), (512, 512), (2048, 2048)])
def test_plain_and_blocked(l, m):
    inputs = qkv(2, 3, l, 8, m)
    expected = reference(*inputs)
    for attend in (attention.dot_product, attention.blocked):
        assert np.abs(np.asarray(jax.jit(attend)(*inputs)) - expected).max() < 2e-6


@pytest.mark.parametrize("length,blocks", [(256, None), (200, None), (384, {"block_q": 128, "block_kv": 128, "block_kv_compute": 128}),
                                            (600, {"block_kv": 256}), (600, {"block_kv_compute": 384})])  # fmt: skip
@pytest.mark.parametrize("keys", [None, 520])
def test_splash_in_interpret_mode(length, blocks, keys):
    """Padding to whole blocks must not be attended to; a device may have fewer queries than there are keys."""
    inputs = qkv(2, 2, length, 128, keys)
    got = attention.splash(*inputs, blocks=blocks, interpret=True)
    assert got.shape == inputs[0].shape
    assert np.abs(np.asarray(got) - reference(*inputs)).max() < 1e-4


@pytest.mark.parametrize("l,m", [(7, 7), (96, 33), (1100, 1100)])
def test_factors_are_a_bias(l, m):
    """The product of a query's number and a key's is added to its score, in each row by itself; of splash too."""
    q, k, v = qkv(2, 3, l, 8, m)
    of_queries, of_keys = (jax.random.normal(jax.random.key(n), (2, n)) for n in (l, m))
    bias = np.asarray(of_queries)[:, None, :, None] * np.asarray(of_keys)[:, None, None]
    expected = reference(q, k, v, bias)
    plain, blocked = (
        np.asarray(jax.jit(attend)(q, k, v, (of_queries, of_keys)))
        for attend in (attention.dot_product, attention.blocked)
    )
    assert np.abs(plain - expected).max() < 5e-6 and np.abs(blocked - expected).max() < 5e-6
    assert np.abs(expected - reference(q, k, v)).max() > 0.1
    if m < l:
        wide = qkv(2, 3, l, 128, m)
        got = attention.splash(*wide, (of_queries, of_keys), interpret=True)
        assert np.abs(np.asarray(got) - reference(*wide, bias)).max() < 1e-4


def test_splash_blocks_divide_what_they_pad_to():
    assert attention.splash_blocks(4608) == {"block_q": 2304, "block_kv": 2304, "block_kv_compute": 768}
    assert attention.splash_blocks(4608, "TPU v4") == {"block_q": 2304, "block_kv": 2304, "block_kv_compute": 256}
    assert attention.splash_blocks(4352)["block_q"] == 2176
    assert attention.splash_blocks(600, given={"block_kv": 256}) == {
        "block_q": 640,
        "block_kv": 256,
        "block_kv_compute": 256,
    }
    assert attention.splash_blocks(4608, given={"block_kv_compute": 512, "block_q": 128}) == {
        "block_q": 128,
        "block_kv": 2048,
        "block_kv_compute": 512,
    }
    for length in (1, 127, 128, 1000, 4352, 4608, 5000):
        blocks = attention.splash_blocks(length)
        padded = -(-length // 128) * 128
        assert padded % blocks["block_q"] == 0 and blocks["block_kv"] % blocks["block_kv_compute"] == 0


def test_names():
    assert attention.by_name("auto", "cpu", "float32") is attention.blocked
    assert attention.by_name("auto", "gpu", "bfloat16") is attention.cudnn
    assert attention.by_name("auto", "gpu", "float32") is attention.dot_product  # cuDNN has no float32
    with pytest.raises(ValueError, match="TPU.*CPU"):
        attention.by_name("flash", "cpu", "float32")
    with pytest.raises(ValueError, match="GPU.*TPU"):
        attention.by_name("cudnn_flash_te", "tpu", "bfloat16")
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        attention.by_name("cudnn_flash_te", "gpu", "float32")


def test_scores_are_float32():
    """Scores beyond float16's range must not overflow."""
    q, k, v = (x.astype(jnp.float16) for x in qkv(1, 1, 32, 8))
    assert np.isfinite(np.asarray(attention.dot_product(q * 300, k * 300, v))).all()


COMPILE = """
import functools, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from fluxbatch.models import attention
name, *options = sys.argv[1].split()
(device, *_) = topologies.get_topology_desc(platform="tpu", topology_name=name, **dict(o.split("=") for o in options)).devices
for length in (4352, 4608):
    x = jax.ShapeDtypeStruct((1, 24, length, 128), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    one = jax.ShapeDtypeStruct((1, length), jnp.bfloat16, sharding=x.sharding)
    for factors in [], [(one, one)]:
        program = jax.jit(functools.partial(attention.splash, chip=device.device_kind)).lower(x, x, x, *factors)
        program.compile(compiler_options={"xla_tpu_scoped_vmem_limit_kib": "65536"})
"""


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4:2x2x1 chip_config_name=megacore", "v5e:2x2", "v6e:2x2"])
def test_splash_compiles_for_tpu(chip):
    """FLUX.1's lengths, by libtpu, with the limit that conf/hardware sets."""
    pytest.importorskip("libtpu", reason="needs .[tpu]")
    from fluxbatch.distributed import chips

    done = subprocess.run(
        [sys.executable, "-c", COMPILE, chip], env=os.environ | chips.COMPILE_ONLY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
