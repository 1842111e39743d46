"""Quantizations that are not read: one line that names the quantization, what says so, and what to use instead;
wherever the checkpoint lies and however it is named. What only speaks of one and is whole is read."""

from __future__ import annotations

import json
import re
import shutil

import lora_files
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_hub import hub  # noqa: F401
from test_weights import FLUX, plans
from test_weights_layouts import bfl_flux, black_forest_labs

from fluxbatch.types import UserError
from fluxbatch.weights import find

U8, I8, I32, U32, F32 = np.uint8, np.int8, np.int32, np.uint32, np.float32


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def bnb4(kind):
    return lambda name, w: {
        name: zeros(w.size // 2, 1, dtype=U8),
        f"{name}.absmax": zeros(w.size // 64 + 1),
        f"{name}.quant_map": zeros(16),
        f"{name}.quant_state.bitsandbytes__{kind}": zeros(90, dtype=U8),
    }


def per_stem(**parts):
    """Tensors named after the weight's module: dtype and shape of each."""

    def made(name, w):
        stem = name.removesuffix("weight")
        sizes = {
            "n": len(w),
            "k": w.shape[1],
            "half": w.shape[1] // 2,
            "eighth": max(1, w.shape[1] // 8),
            "group": max(1, w.shape[1] // 16),
        }
        return {
            stem + key.replace("__", "."): zeros(*(sizes.get(n, n) for n in shape), dtype=dtype)
            for key, (dtype, *shape) in parts.items()
        }

    return made


# layout → what it does to a matrix, the word that must be said, the ends of tensors' names that say it
LAYOUTS = {
    "nf4": (bnb4("nf4"), "bitsandbytes NF4", r"quant_state\.bitsandbytes__nf4"),
    "fp4": (bnb4("fp4"), "bitsandbytes FP4", r"quant_state\.bitsandbytes__fp4"),
    "int8": (
        per_stem(weight=(I8, "n", "k"), SCB=(F32, "n"), weight_format=(U8,)),
        "bitsandbytes int8",
        "SCB|weight_format",
    ),
    "quanto": (
        per_stem(weight___data=(I8, "n", "k"), weight___scale=(F32, "n", 1), input_scale=(F32,), output_scale=(F32,)),
        "quanto",
        r"weight\._data|weight\._scale|output_scale",
    ),
    "flux-fp8-api": (
        per_stem(float8_data=(I8, "n", "k"), scale=(F32,), input_scale=(F32,), scale_reciprocal=(F32,)),
        "flux-fp8-api",
        "float8_data|scale_reciprocal",
    ),
    "nunchaku": (
        per_stem(
            qweight=(I8, "n", "half"),
            wscales=(np.float16, "group", "n"),
            smooth=(np.float16, "k"),
            proj_down=(np.float16, "k", 32),
        ),
        "nunchaku (SVDQuant)",
        "wscales|smooth|proj_down",
    ),
    "MLX": (
        per_stem(weight=(U32, "n", "eighth"), scales=(np.float16, "n", "group"), biases=(np.float16, "n", "group")),
        "MLX",
        "biases",
    ),
    "nvfp4": (
        per_stem(weight=(U8, "n", "half"), weight_scale=(F32, "n", "group"), weight_scale_2=(F32,), input_scale=(F32,)),
        "nvfp4",
        "weight_scale_2",
    ),
    "torchao": (
        per_stem(_weight_qdata=(I8, "n", "k"), _weight_scale=(F32, "n", 1)),
        "torchao",
        "_weight_qdata|_weight_scale",
    ),
    "torchao, older": (
        lambda name, w: {f"{name}:qdata": zeros(*w.shape, dtype=I8), f"{name}:scale": zeros(len(w), 1)},
        "torchao",
        "weight:qdata|weight:scale",
    ),
    "GPTQ": (
        per_stem(qweight=(I32, "eighth", "n"), qzeros=(I32, 1, "n"), scales=(np.float16, 1, "n"), g_idx=(I32, "k")),
        "GPTQ",
        "g_idx",
    ),
    "AWQ": (
        per_stem(qweight=(I32, "eighth", "n"), qzeros=(I32, 1, "n"), scales=(np.float16, 1, "n")),
        "AWQ",
        "qweight|qzeros",
    ),
    "HQQ": (per_stem(W_q=(U8, "n", "half")), "HQQ", "W_q"),
    "compressed": (
        per_stem(weight_packed=(I32, "n", "eighth"), weight_scale=(F32, "n", 1)),
        "compressed-tensors",
        "weight_packed",
    ),
    "fp8 in blocks": (
        per_stem(weight=(I8, "n", "k"), weight_scale_inv=(F32, 1, 1)),
        "fp8 in blocks",
        "weight_scale_inv",
    ),
    "plain int8": (per_stem(weight=(I8, "n", "k")), "looks quantized", "weight of dtype int8"),
    "int8 with scales": (
        per_stem(weight=(I8, "n", "k"), weight_scale=(F32, "n", 1)),
        "looks quantized",
        "weight of dtype int8",
    ),
}


def quantize(tensors, change):
    out = {}
    for name, value in tensors.items():
        out |= change(name, value) if value.ndim == 2 and name.endswith("weight") else {name: value}
    return out


def complaint(path, **other):
    with pytest.raises(UserError) as error:
        plans(path, **other)
    assert len(error.value.lines) == 1 and "\n" not in str(error.value), error.value.lines
    return str(error.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_quantization_is_named(golden, tmp_path, name):
    """In diffusers' directory, in a single file, and beneath a prefix of one."""
    change, word, sign = LAYOUTS[name]
    directory = shutil.copytree(golden / "dev", tmp_path / "directory")
    save_file(quantize(load_file(directory / FLUX), change), directory / FLUX)
    file = black_forest_labs(golden / "dev", tmp_path / "single")["path"]
    whole = quantize(load_file(file), change)
    save_file(whole, file)
    prefixed = file.with_name("prefixed.safetensors")
    save_file({f"model.diffusion_model.{key}": value for key, value in whole.items()}, prefixed)
    for path in (directory, file, prefixed):
        output = complaint(path)
        assert (
            word in output
            and re.search(rf"\(tensor \S+\.(?:{sign})[,)]", f"{output}")
            and find.INSTEAD in output
            and "expected bfloat16" in output
        ), output
        assert str(directory / "transformer" if path == directory else path) in output


def test_a_text_encoder_too(golden, tmp_path):
    directory = shutil.copytree(golden / "dev", tmp_path / "it")
    file = directory / "text_encoder_2/model.safetensors"
    save_file(quantize(load_file(file), LAYOUTS["nf4"][0]), file)
    assert f"{file.parent}: looks quantized with bitsandbytes NF4" in complaint(directory)
    plans(directory, t5=str(golden / "dev"))  # which is not read then
    assert "bitsandbytes NF4" in complaint(golden / "dev", t5=str(file))


def test_a_config_names_what_integers_do_not(golden, tmp_path):
    """Whole weights are read whatever it says: they have been multiplied out."""
    directory = shutil.copytree(golden / "dev", tmp_path / "it")
    config = directory / "transformer/config.json"
    given = {"quant_method": "quanto", "weights_dtype": "int4"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": given}))
    plans(directory)
    tensors = load_file(directory / FLUX)
    save_file(tensors | {"x_embedder.weight": tensors["x_embedder.weight"].astype(np.int8)}, directory / FLUX)
    assert "quantized with quanto int4 (tensor x_embedder.weight of dtype int8)" in complaint(directory)
    save_file(
        {name: value for name, value in tensors.items() if name != "x_embedder.weight"} | {"x_embedder.what": zeros(1)},
        directory / FLUX,
    )
    assert "config.json: looks quantized with quanto int4 (its quantization_config is {" in complaint(directory)


@pytest.mark.parametrize(
    "key,value,word",
    [
        ("tensor_names", '["x_embedder.weight"]', "torchao"),
        ("quantization_level", "4", "MLX"),
        ("format", "mlx", "MLX"),
        ("quantization_config", '{"method": "svdquant"}', "svdquant"),
        ("_quantization_metadata", '{"layers": {"x": {"format": "nvfp4"}}}', "nvfp4"),
    ],
)
def test_a_header_names_what_tensors_do_not(golden, tmp_path, key, value, word):
    directory = shutil.copytree(golden / "dev", tmp_path / "it")
    tensors = load_file(directory / FLUX)
    lora_files.save(directory / FLUX, tensors, {key: value})
    plans(directory)
    tensors["x_embedder.strange"] = tensors.pop("x_embedder.weight")
    lora_files.save(directory / FLUX, tensors, {key: value})
    output = complaint(directory)
    assert f"looks quantized with {word} (its header " in output and key in output and find.INSTEAD in output
    lora_files.save(directory / FLUX, tensors, {"format": "pt", "quantization": ""})
    with pytest.raises(UserError, match="tensor that the model does not have: x_embedder.strange"):
        plans(directory)


@pytest.mark.parametrize("dtype,word", [("F4", "fp4"), ("F8_E8M0", "mxfp8"), ("F6_E2M3", "mxfp6")])
def test_dtypes_that_only_quantizations_have(golden, tmp_path, dtype, word):
    file = shutil.copytree(golden / "dev", tmp_path / "it") / FLUX
    data = file.read_bytes()
    file.write_bytes(
        data.replace(b'"F32"', f'"{dtype}"'.encode().ljust(5)[:5] if len(dtype) < 4 else f'"{dtype}"'.encode(), 1)
    )
    count = int.from_bytes(data[:8], "little") + len(file.read_bytes()) - len(data)
    file.write_bytes(count.to_bytes(8, "little") + file.read_bytes()[8:])
    output = complaint(tmp_path / "it")
    assert (
        f"looks quantized with {word[:4]}" in output.replace("mxfp4 or mxfp8", "mxfp8")
        and f"of dtype {dtype}" in output
        and find.INSTEAD in output
    )


def test_scales_in_blocks(golden, tmp_path):
    """mxfp8: bytes for scales, one for each 32 numbers of a row."""
    file = black_forest_labs(golden / "dev", tmp_path / "it")["path"]
    tensors = load_file(file)
    rows = len(tensors["img_in.weight"])
    save_file(tensors | {"img_in.weight_scale": zeros(rows, 2, dtype=U8)}, file)
    output = complaint(file)
    assert (
        f"img_in.weight_scale: a scale of shape [{rows}, 2], uint8, " in output
        and "quantized in blocks" in output
        and find.INSTEAD in output
    )


GGUF = b"GGUF" + (3).to_bytes(4, "little") + bytes(100)


def test_gguf_by_any_name(golden, tmp_path):
    """Named as it is, or wrongly; as the model, a component, or all that a directory has."""
    for name in ("flux1-dev-Q4_K_S.gguf", "T5.GGUF"):
        (tmp_path / name).write_bytes(GGUF)
        output = complaint(tmp_path / name)
        assert (
            output.startswith("model.pretrained_model_name_or_path: ")
            and "a GGUF file, a quantization" in output
            and find.INSTEAD in output
        )
        assert (
            "model.t5xxl_model_name_or_path" in (output := complaint(golden / "dev", t5=str(tmp_path / name)))
            and "GGUF" in output
        )
    (tmp_path / "flux1.safetensors").write_bytes(GGUF)
    assert f"{tmp_path}/flux1.safetensors: is a GGUF file" in complaint(tmp_path / "flux1.safetensors")
    directory = shutil.copytree(golden / "dev", tmp_path / "it")
    (directory / FLUX).rename(directory / "transformer/flux1-dev-Q8_0.gguf")
    assert f"{directory}/transformer: looks quantized with GGUF (it has flux1-dev-Q8_0.gguf)" in complaint(directory)
    (directory / "transformer/flux1-dev-Q8_0.gguf").rename(directory / FLUX)
    (directory / FLUX).write_bytes(GGUF)
    assert f"{directory}/{FLUX}: is a GGUF file" in complaint(directory)
    (tmp_path / "alone").mkdir()
    (tmp_path / "flux1-dev-Q4_K_S.gguf").rename(tmp_path / "alone/flux1-dev-Q4_K_S.gguf")
    assert "looks quantized with GGUF" in complaint(tmp_path / "alone")


def test_a_repository_of_gguf_files(hub, golden):  # noqa: F811
    (hub.root / "some/gguf").mkdir(parents=True)
    (hub.root / "some/gguf/flux1-dev-Q4_0.gguf").write_bytes(GGUF)
    for given in (
        dict(path="some/gguf"),
        dict(path=golden / "dev", t5="some/gguf"),
        dict(path="some/gguf/flux1-dev-Q4_0.gguf"),
    ):
        output = complaint(**given)
        assert "GGUF" in output and "flux1-dev-Q4_0.gguf" in output and find.INSTEAD in output


@pytest.mark.parametrize(
    "data,word",
    [
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(99), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(99), "gzip"),
    ],
)
def test_what_else_is_called_safetensors(golden, tmp_path, data, word):
    directory = shutil.copytree(golden / "dev", tmp_path / "it")
    (directory / FLUX).write_bytes(data)
    output = complaint(directory)
    assert f"{FLUX}: is " in output and word in output


def test_directories_of_other_programs(golden, tmp_path):
    """Without the usual names: what is there is looked into. mflux: no config; nunchaku: two files."""
    for name, file, keep in (("MLX", "0.safetensors", False), ("nunchaku", "transformer_blocks.safetensors", True)):
        directory = shutil.copytree(golden / "dev", tmp_path / name)
        tensors = quantize(load_file(directory / FLUX), LAYOUTS[name][0])
        (directory / FLUX).unlink()
        save_file(tensors, directory / "transformer" / file)
        if not keep:
            (directory / "transformer/config.json").unlink()
        assert f"transformer/{file}: looks quantized with {LAYOUTS[name][1]}" in complaint(directory)


def test_fp8_is_no_such_quantization(golden, tmp_path):
    """ComfyUI's notes beside fp8 weights, and integers that no parameter is made of."""
    directory = shutil.copytree(golden / "dev", tmp_path / "it")
    file = directory / "text_encoder/model.safetensors"
    ids = (
        "text_model.embeddings.position_ids"
        if any(name.startswith("text_model.") for name in load_file(file))
        else "embeddings.position_ids"
    )
    save_file(load_file(file) | {ids: np.arange(77)[None]}, file)
    whole = bfl_flux(load_file(directory / FLUX))
    notes = {
        "scaled_fp8": zeros(2, dtype=I8),
        "img_in.comfy_quant": zeros(9, dtype=U8),
        "img_in.scale_weight": np.ones(1, F32),
        "img_in.input_scale": np.ones(1, F32),
    }
    save_file(whole | notes, directory / FLUX)
    plans(directory)
