"""Weights in eight bits: what they cost in quality and memory, and that all that moves weights moves them too."""

from __future__ import annotations

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import images, metadata, psnr
from flax import nnx
from lora_files import arrays
from test_lora import adapters  # noqa: F401
from test_weights import plans
from test_weights_memory import ALLOWED, bench, written

from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.models.layers import Linear
from fluxbatch.weights import load
from fluxbatch.weights.precision import EIGHT_BITS, Precision, quantized

INT8, FP8 = Precision.named("int8", "float32"), Precision.named("float8_e4m3fn", "float32")
MESHES = [(1, 8), (1, 2, 1, 2)]


def values(module):
    """Every parameter by its path."""
    return {
        load.path_of(keys): np.asarray(leaf.get_value())
        for keys, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }


@functools.cache
def loaded(golden, part, mesh=(1, 1), precision=INT8):
    return values(load.load(plans(golden / "dev")[part], make_mesh(mesh), precision))


@pytest.mark.parametrize("precision,step", [(INT8, 0.5 / 127), (FP8, 2**-4)], ids=["int8", "float8"])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_2"])
def test_kernels_of_blocks_and_nothing_else(golden, part, precision, step):
    """Each output is as near as its largest weight allows, and everything outside the blocks is as it was."""
    plain, found = (loaded(golden, part, (1, 1), p) for p in (Precision.of(np.float32), precision))
    scaled = {path.removesuffix("scale") for path in found.keys() - plain.keys()}
    assert scaled == {path.removesuffix("kernel") for path in plain if "blocks." in path and path.endswith("kernel")}
    for path, value in plain.items():
        stem = path.removesuffix("kernel")
        if stem not in scaled:
            assert np.array_equal(found[path], value), path
            continue
        assert found[path].dtype == precision.kernels and found[f"{stem}scale"].dtype == np.float32
        again = found[path].astype(np.float32) * found[f"{stem}scale"][..., None]
        size = np.abs(value) if precision is FP8 else np.abs(value).max(-1, keepdims=True)
        smallest = found[f"{stem}scale"][..., None] * 2**-9  # of float8
        assert (np.abs(again - value) <= np.maximum(size * step * 1.001, smallest)).all(), path
        assert (np.abs(found[path].astype(np.float32)).max(-1) == EIGHT_BITS[precision.kernels.name]).all(), path


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_same_on_every_mesh(golden, mesh):
    """Rows and columns of tensor parallelism, FSDP where rows divide and where they do not: the numbers are the same."""
    for part in ("transformer", "text_encoder_2"):
        plain, found = loaded(golden, part), loaded(golden, part, mesh)
        assert plain.keys() == found.keys()
        for path, value in plain.items():
            if path == "single_blocks.out.kernel" and len(mesh) == 4:
                value = np.take(value, order(value.shape[-1] // 5), -1)  # what stands side by side is dealt apart
            assert np.array_equal(value, found[path]), path


def order(width):
    """Columns of a single block's ``out`` on two devices: half of attention and half of the MLP on each."""
    columns = np.arange(5 * width)
    both = np.split(columns[:width], 2), np.split(columns[width:], 2)
    return np.concatenate([part for half in zip(*both, strict=True) for part in half])


@pytest.mark.parametrize(
    "scale", [None, np.float32(0.5), np.arange(1, 5, dtype=np.float32)[:, None]], ids=["", "one", "rows"]
)
def test_numbers_of_that_dtype_stay_as_they_are(scale):
    """As float8 files have them, with their scales; of other numbers the scale is part."""
    given = np.array([[1, 2], [3, -448], [0, 0], [0.5, 2**-9]], np.float32)
    kernel, scales = quantized(jnp.asarray(given, jnp.float8_e4m3fn), scale, FP8.kernels)
    assert np.array_equal(kernel.astype(np.float32), given)
    assert np.array_equal(scales, np.broadcast_to(1 if scale is None else np.reshape(scale, -1), 4))
    kernel, scales = quantized(jnp.asarray(given, jnp.float8_e4m3fn), scale, INT8.kernels)
    wanted = given * (1 if scale is None else scale)
    assert np.allclose(kernel * scales[:, None], wanted, atol=np.abs(wanted).max(-1, keepdims=True) / 253)


def test_a_damaged_weight_is_seen():
    """NaN goes on to the picture, which is rejected; infinity becomes NaN."""
    kernel, scales = quantized(jnp.array([[np.nan, 1], [np.inf, 1], [1, 1]], jnp.float32), None, INT8.kernels)
    found = np.asarray(kernel * scales[:, None]).sum(-1)
    assert np.isnan(found[:2]).all() and found[2] == 2


def test_the_product_is_of_what_the_kernel_stands_for(golden):
    """In float32, bfloat16 and float16, flat and into heads, with a bias."""
    layer = Linear(64, 96, (None, None), rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(96.0)
    kernel, scales = quantized(layer.kernel[...], None, INT8.kernels)
    x = jax.random.normal(jax.random.key(0), (2, 5, 64)) * 8
    layer.kernel[...] = kernel.astype(jnp.float32) * scales[:, None]
    plain = layer(x)
    layer.kernel, layer.scale = nnx.Param(kernel), nnx.Param(scales)
    for dtype, error in ((jnp.float32, 1e-5), (jnp.bfloat16, 2**-7), (jnp.float16, 2**-9)):
        for split in (True, False) if dtype == jnp.float32 else (True,):
            y = layer.to_heads(x.astype(dtype), 4, split).swapaxes(1, 2).reshape(2, 5, 96)
            assert y.dtype == dtype and np.allclose(y, plain, atol=error * np.abs(plain).max())


@pytest.mark.parametrize("precision,error", [(INT8, 0.01), (FP8, 0.04)], ids=["int8", "float8"])
def test_products_in_eight_bits(precision, error):
    """Near the plain product, flat and into heads, a token by itself; of vectors and without the mark they are plain."""
    layer = Linear(64, 96, (None, None), rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(96.0)
    kernel, scales = quantized(layer.kernel[...], None, precision.kernels)
    x = jax.random.normal(jax.random.key(0), (2, 5, 64)) * jnp.array([1e-3, 1, 8, 1e3, 0])[:, None]
    layer.kernel[...] = kernel.astype(jnp.float32) * scales[:, None]
    plain = layer(x)
    layer.kernel, layer.scale = nnx.Param(kernel), nnx.Param(scales, products=False)
    assert np.allclose(layer(x), plain, rtol=1e-4, atol=1e-4)
    layer.scale = nnx.Param(scales, products=True)
    size = np.abs(plain - layer.bias[...]).max(-1, keepdims=True)
    for dtype in (jnp.float32, jnp.bfloat16):
        y = layer(x.astype(dtype))
        near = error * size + (0 if dtype == jnp.float32 else 2**-7 * np.abs(plain))
        assert y.dtype == dtype and (np.abs(y.astype(jnp.float32) - plain) <= near).all()
    y = layer(x)
    assert not np.array_equal(y, plain)
    assert np.array_equal(layer.to_heads(x, 4).swapaxes(1, 2).reshape(2, 5, 96), y)
    assert np.allclose(layer(x[1:, 2:3]), y[1:, 2:3], rtol=0 if precision is INT8 else 1e-5, atol=0)
    assert np.isnan(layer(x.at[0, 1, 3].set(np.nan))[0, 1]).all() and np.array_equal(layer(x)[1], y[1])
    assert "i32" in str(jax.make_jaxpr(layer)(x)) or precision is FP8
    layer.tokens = False
    assert np.allclose(layer(x), plain, rtol=1e-4, atol=1e-4)


def run(cli, golden, folder, name, *args, model="dev", rows=None):
    code, err = cli(
        f"pretrained_model_name_or_path={golden / model}",
        f"manifest={rows or golden / f'{model}.jsonl'}",
        "max_sequence_length=24",
        "hardware=cpu",
        f"output_dir={folder}",
        f"run_name={name}",
        "gallery=false",
        *args,
    )
    assert code == 0, err
    return images(folder / name)


def apart(a, b):
    assert a.keys() == b.keys()
    return max(np.abs(picture.astype(int) - b[key].astype(int)).max() for key, picture in a.items())


def mean_psnr(found, wanted):
    return np.mean([psnr(picture, wanted[key]) for key, picture in found.items()])


@pytest.mark.parametrize("model", ["dev", pytest.param("schnell", marks=pytest.mark.slow)])
def test_quality_of_whole_random_pipelines(cli, golden, tmp_path, model):
    """To diffusers in float32. (dev, schnell: int8 47, 46 dB; float8 32, 37; bfloat16's weights 48, 51.)"""
    wanted = np.load(golden / f"{model}.npz")
    found = {
        dtype: run(cli, golden, tmp_path, dtype, f"weights_dtype={dtype}", model=model)
        for dtype in ("int8", "float8_e4m3fn")
    }
    quality = {dtype: mean_psnr(pictures, wanted) for dtype, pictures in found.items()}
    assert quality["int8"] >= 43 and quality["float8_e4m3fn"] >= 30, quality
    assert metadata(tmp_path / "int8")[0]["weights_dtype"] == "int8"


@pytest.mark.parametrize("model", ["dev", pytest.param("schnell", marks=pytest.mark.slow)])
def test_quality_with_products_in_eight_bits(cli, golden, tmp_path, model):
    """To diffusers in float32: little below that of the weights alone. (dev, schnell: int8 46, 45 dB; float8 31, 36.)"""
    wanted = np.load(golden / f"{model}.npz")
    for dtype, least in (("int8", 43), ("float8_e4m3fn", 29)):
        found = run(cli, golden, tmp_path, dtype, f"matmul_dtype={dtype}", "weights_dtype=auto", model=model)
        record = metadata(tmp_path / dtype)[0]
        assert (record["weights_dtype"], record["matmul_dtype"]) == (dtype, dtype)
        assert mean_psnr(found, wanted) >= least, dtype


def test_products_need_weights_in_their_dtype(cli, golden, tmp_path):
    code, err = cli("prompt=x", "model=flux-mini", "hardware=cpu", "matmul_dtype=int8", f"output_dir={tmp_path}")
    assert code == 2 and "matmul_dtype=int8: expected weights_dtype=int8 or auto beside it, got float32" in err


SHARDED = {
    "fsdp": ["sharding=fsdp"],
    "tensor": ["ici_tensor_parallelism=2", "ici_fsdp_parallelism=2"],
    "streamed": ["stream_blocks=true"],
    "free": ["offload_encoders=free"],
}


@pytest.mark.parametrize(
    "how", ["streamed", *(pytest.param(how, marks=pytest.mark.slow) for how in ("fsdp", "tensor", "free"))]
)
def test_pictures_are_the_same_however_the_weights_lie(cli, golden, tmp_path, adapters, how):  # noqa: F811
    """With an adapter, which is merged before its layers are quantized."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "seed": 1}\n{"prompt": "b", "seed": 2}\n')
    more = ["weights_dtype=int8", "resolution=32", "num_inference_steps=2", *arrays({"peft": adapters["peft"]}, 0.5)]
    rows = tmp_path / "rows.jsonl"
    plain = run(cli, golden, tmp_path, "plain", *more, rows=rows)
    assert apart(run(cli, golden, tmp_path, how, *more, *SHARDED[how], rows=rows), plain) <= 1
    assert apart(run(cli, golden, tmp_path, "without", *more[:3], rows=rows), plain) > 20


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "tensor", "streamed"])
def test_products_are_the_same_however_the_weights_lie(cli, golden, tmp_path, how):
    """A token's size is that of all its channels, whichever device has them; sums of integers are exact."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "seed": 1}\n{"prompt": "b", "seed": 2}\n')
    more = ["weights_dtype=int8", "matmul_dtype=int8", "resolution=32", "num_inference_steps=2"]
    plain = run(cli, golden, tmp_path, "plain", *more, rows=tmp_path / "rows.jsonl")
    again = run(cli, golden, tmp_path, how, *more, *SHARDED[how], rows=tmp_path / "rows.jsonl")
    assert mean_psnr(again, plain) >= 45, mean_psnr(again, plain)


def test_adapters_beside_eight_bits(cli, golden, tmp_path, adapters):  # noqa: F811
    """Each row's own mix is near the same mix merged: other numbers are rounded."""
    mixes = [{"peft": 0.5}, {"peft": 1.0}]
    made = {}
    for name, chosen in (("both", mixes), ("one", mixes[:1]), ("two", mixes[1:])):
        rows = tmp_path / f"{name}.jsonl"
        lines = [{"id": str(mix), "prompt": "a", "seed": 1, "lora": mix} for mix in chosen]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        more = ["weights_dtype=int8", "resolution=32", "num_inference_steps=2", *arrays({"peft": adapters["peft"]})]
        made[name] = run(cli, golden, tmp_path, name, *more, rows=rows)
    assert mean_psnr(made["both"], made["one"] | made["two"]) >= 35
    assert psnr(*made["both"].values()) < 28


def test_swapped_adapters_leave_no_trace(golden):
    plan, mesh = plans(golden / "dev")["transformer"], make_mesh((1, 1))
    path = "single_blocks.out.kernel"
    state = nnx.split(load.load(plan, mesh, INT8))[1]
    before = values(nnx.merge(*nnx.split(load.load(plan, mesh, INT8))))
    edits = {(path, 1): lambda old: old + np.eye(*old.shape, dtype=np.float32)}
    changed = load.reload(plan, state, {path}, mesh, INT8, edits=edits)
    at = {load.path_of(keys): np.asarray(leaf.get_value()) for keys, leaf in nnx.to_flat_state(changed)}
    assert {name for name in at if not np.array_equal(at[name], before[name])} == {path, "single_blocks.out.scale"}
    assert np.array_equal(at[path][0], before[path][0])
    again = load.reload(plan, changed, {path}, mesh, INT8)
    at = {load.path_of(keys): np.asarray(leaf.get_value()) for keys, leaf in nnx.to_flat_state(again)}
    assert all(np.array_equal(at[name], before[name]) for name in at)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "gigabytes"), [("1,1", 0.8), ("1,1", 3), ("1,8", 0.8)])
def test_memory_while_they_stream(tmp_path, mesh, gigabytes):
    """What is there besides the arrays does not grow with the checkpoint. On a CPU the compiler of what quantizes is in
    it, and a layer in float32."""
    file = written(tmp_path, gigabytes)
    largest = max(math.prod(shape) for _, shape in bench.planned(str(file)).shapes.values())
    (result,) = bench.in_process("fluxbatch", file, mesh, dtype="int8", devices=8 if mesh == "1,8" else 1)
    file.unlink()
    assert result["extra"] <= ALLOWED + (128 << 20) + 4 * largest, result
    assert result["owned"] <= 0.53 * result["bytes"], result  # of bfloat16's


@pytest.mark.parametrize("model,target,memory,dtype", [
    ("flux-dev", "v5e-1", 15.75, "int8"),
    ("flux-dev", "4090", 15, "float8_e4m3fn"),
    ("flux2-klein-4b", "4090", 7.2, "int8"),
])  # fmt: skip
def test_what_fits(cli, tmp_path, model, target, memory, dtype):
    """FLUX.1 dev in one v5e, or a GPU of 16 GB, and klein in 8 GB with a tenth of it kept from JAX."""
    command = [f"model={model}", "prompt=x", f"target={target}", "aot=false", f"output_dir={tmp_path}"]
    needs = {}
    for weights in ("bfloat16", dtype):
        code, text = cli(*command, f"weights_dtype={weights}", entry="plan")
        assert code == 0, text
        needs[weights] = max(float(size) for size in re.findall(r"= ([\d.]+) GiB a device", text))
    assert needs[dtype] <= memory < needs["bfloat16"]
