"""Checkpoints that are not what they claim are refused before anything is compiled; good ones fill
every parameter, whatever the mesh."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from fluxbatch.config.schema import Model, Verify
from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.types import UserError
from fluxbatch.weights import load
from fluxbatch.weights.checkpoint import find, open_checkpoint

FLUX = "transformer/diffusion_pytorch_model.safetensors"


def model(path, **other):
    return Model(
        "x", str(path), None, other.get("clip"), other.get("t5"), other.get("vae"), Verify[other.get("verify", "none")]
    )


@pytest.fixture
def copy(golden, tmp_path):
    return shutil.copytree(golden / "dev", tmp_path / "model")


def plans(path, **other):
    checkpoint = open_checkpoint(model(path, **other))
    return {name: component.plan() for name, component in checkpoint.components.items()}


def test_every_parameter_is_filled_with_its_bytes(golden):
    plan = plans(golden / "dev")["transformer"]
    module = load.load(plan, make_mesh((1, 1)), np.float32)
    file = load_file(golden / "dev" / FLUX)
    block = module.double_blocks.img
    assert np.array_equal(block.qkv.v.kernel[...][1], file["transformer_blocks.1.attn.to_v.weight"])
    rows, _ = block.qkv.q.kernel.get_metadata()["axes"]  # rotated pairs become halves
    assert np.array_equal(block.qkv.q.kernel[...][1], rows.halved(file["transformer_blocks.1.attn.to_q.weight"], 0))
    assert np.array_equal(
        block.qkv.key_norm.scale[...][1], rows.halved(file["transformer_blocks.1.attn.norm_k.weight"], 0)
    )
    scale, shift = np.split(file["norm_out.linear.weight"], 2)
    assert np.array_equal(module.final_mod.kernel[...], np.concatenate([shift, scale]))
    assert plan.nbytes == sum(x.nbytes for x in file.values())


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)])
def test_sharded_weights_equal_whole_ones(golden, shape):
    plan = plans(golden / "dev")
    for name in plan:
        seen = []
        whole = load.load(plan[name], make_mesh((1, 1)), np.float32)
        parts = load.load(plan[name], make_mesh(shape), np.float32, seen.append)
        one, many = (jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (whole, parts))
        assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))
        axes = [leaf.get_metadata()["axes"] for _, leaf in nnx.to_flat_state(plan[name].state)]
        held = [leaf.addressable_shards[0].data.nbytes for leaf in many]
        total = [leaf.nbytes for leaf in many]
        assert all(h == t for h, t, a in zip(held, total, axes, strict=True) if len(a) == 1)  # biases, norms
        divided = [(h, t) for h, t, a in zip(held, total, axes, strict=True) if len(a) > 1]
        assert sum(h for h, _ in divided) <= 1.05 * sum(t for _, t in divided) / shape[1]  # odd sizes stay whole
        assert sum(seen) <= plan[name].nbytes  # each distinct range is read once, not once per device
        assert sum(seen) == load.to_read(plan[name], make_mesh(shape), {})


def test_weights_are_cast(golden):
    module = load.load(plans(golden / "dev")["vae"], make_mesh((1, 1)), "bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(module, nnx.Param))} == {"bfloat16"}


def test_sharded_files_with_an_index(copy):
    """The same weights split over two files."""
    file = copy / FLUX
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, members in parts.items():
        save_file({n: tensors[n] for n in members}, file.parent / part)
    index = {"weight_map": {n: part for part, members in parts.items() for n in members}}
    (file.parent / (file.name + ".index.json")).write_text(json.dumps(index))
    file.unlink()
    module = load.load(plans(copy)["transformer"], make_mesh((1, 1)), np.float32)
    assert np.array_equal(module.img_in.kernel[...], tensors["x_embedder.weight"])

    index["weight_map"][names[0]] = "b.safetensors"
    (file.parent / (file.name + ".index.json")).write_text(json.dumps(index))
    with pytest.raises(UserError, match=names[0]):
        plans(copy)
    del index["weight_map"][names[0]]
    (file.parent / (file.name + ".index.json")).write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not list"):
        plans(copy)
    (file.parent / "b.safetensors").unlink()
    with pytest.raises(UserError, match="b.safetensors"):
        plans(copy)


def test_encoders_from_elsewhere(golden, copy, tmp_path):
    shutil.copytree(copy / "text_encoder", tmp_path / "clip")
    for file in (copy / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "clip")
    shutil.rmtree(copy / "text_encoder")
    shutil.rmtree(copy / "text_encoder_2")
    plans(copy, clip=str(tmp_path / "clip"), t5=str(golden / "dev"))
    with pytest.raises(UserError, match="text_encoder"):
        plans(copy)


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rename(tensors):
    tensors["proj_out.wait"] = tensors.pop("proj_out.weight")


def reshape(tensors):
    tensors["x_embedder.weight"] = tensors["x_embedder.weight"][:, :3].copy()


def clip_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def set_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(path, key):
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))


BROKEN = {
    "a renamed tensor": (lambda p: edit(p / FLUX, rename), ["proj_out.wait", "final_out.kernel"]),
    "a missing tensor": (lambda p: edit(p / FLUX, lambda t: t.pop("proj_out.bias")), ["final_out.bias"]),
    "a wrong shape": (lambda p: edit(p / FLUX, reshape), ["x_embedder.weight", "[32, 3]"]),
    "a truncated file": (lambda p: clip_file(p / FLUX, -100), ["truncated", FLUX]),
    "a cut header": (lambda p: clip_file(p / FLUX, 100), ["header"]),
    "an absurd header": (lambda p: (p / FLUX).write_bytes(b"\xff" * 64), ["header claims"]),
    "an empty file": (lambda p: (p / FLUX).write_bytes(b""), [FLUX, "fewer than 8 bytes"]),
    "hardly a file": (lambda p: (p / FLUX).write_bytes(b"abc"), [FLUX, "fewer than 8 bytes"]),
    "a tensor without a shape": (
        lambda p: (p / FLUX).write_bytes(
            (48).to_bytes(8, "little") + b'{"a":{"dtype":"F32","data_offsets":[0,4]}}'.ljust(48) + bytes(4)
        ),
        ["'shape' is missing"],
    ),
    "a header of no JSON": (lambda p: (p / FLUX).write_bytes((8).to_bytes(8, "little") + b"notjson!"), ["not JSON"]),
    "a header of no object": (
        lambda p: (p / FLUX).write_bytes((8).to_bytes(8, "little") + b"[1]     "),
        ["header is unsound"],
    ),
    "an unknown dtype": (
        lambda p: (p / FLUX).write_bytes(
            b"".join([(56).to_bytes(8, "little"), b'{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,1]}}   ', b"x"])
        ),
        ["Q4"],
    ),
    "overlapping tensors": (
        lambda p: (p / FLUX).write_bytes(
            (111).to_bytes(8, "little")
            + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(
                111
            )
            + bytes(4)
        ),
        ["tile"],
    ),
    "no weights": (lambda p: (p / FLUX).unlink(), ["no weights"]),
    "no transformer": (lambda p: shutil.rmtree(p / "transformer"), ["transformer"]),
    "no VAE": (lambda p: shutil.rmtree(p / "vae"), ["vae"]),
    "no scheduler": (lambda p: shutil.rmtree(p / "scheduler"), ["scheduler_config.json"]),
    "no tokenizer": (lambda p: shutil.rmtree(p / "tokenizer_2"), ["tokenizer_2"]),
    "a config of no JSON": (lambda p: (p / "vae/config.json").write_text("{"), ["vae/config.json", "JSON"]),
    "a config without a size": (
        lambda p: (p / "transformer/config.json").write_text("{}"),
        ["transformer/config.json", "attention_head_dim"],
    ),
    "another model": (
        lambda p: set_json(p / "transformer/config.json", _class_name="SD3Transformer2DModel"),
        ["SD3Transformer2DModel"],
    ),
    "another pipeline": (
        lambda p: set_json(p / "model_index.json", _class_name="StableDiffusionPipeline"),
        ["StableDiffusionPipeline"],
    ),
    "a resolution of references in words": (
        lambda p: set_json(p / "model_index.json", _class_name="FluxKontextPipeline", _reference_resolution="low"),
        ['model_index.json: _reference_resolution is "low", expected a whole number from 16'],
    ),
    "no resolution of references": (
        lambda p: set_json(p / "model_index.json", _class_name="FluxKontextPipeline", _reference_resolution=0),
        ["model_index.json: _reference_resolution is 0, expected a whole number from 16"],
    ),
    "T5 v1.0": (lambda p: set_json(p / "text_encoder_2/config.json", feed_forward_proj="relu"), ["feed_forward_proj"]),
    "another activation of T5": (
        lambda p: set_json(p / "text_encoder_2/config.json", dense_act_fn="relu"),
        ["dense_act_fn 'relu'"],
    ),
    "another activation of the VAE": (lambda p: set_json(p / "vae/config.json", act_fn="gelu"), ["act_fn 'gelu'"]),
    "odd rope axes": (lambda p: set_json(p / "transformer/config.json", axes_dims_rope=[3, 6, 7]), ["axes_dims_rope"]),
    "no number of layers": (
        lambda p: without(p / "transformer/config.json", "num_layers"),
        ["transformer/config.json: key 'num_layers' is missing"],
    ),
    "a number in quotes": (
        lambda p: set_json(p / "transformer/config.json", num_attention_heads="2"),
        ['num_attention_heads is "2", expected a whole number from 0'],
    ),
    "channels that are no list": (
        lambda p: set_json(p / "vae/config.json", block_out_channels="x"),
        ['block_out_channels is "x", expected a list of whole numbers'],
    ),
    "a factor in quotes": (
        lambda p: set_json(p / "vae/config.json", scaling_factor="0.36"),
        ['scaling_factor is "0.36", expected a number'],
    ),
    "several ends": (
        lambda p: set_json(p / "text_encoder/config.json", eos_token_id=[2]),
        ["eos_token_id is [2], expected a whole number from 0"],
    ),
    "heads that do not divide": (
        lambda p: set_json(p / "text_encoder/config.json", num_attention_heads=3),
        ["num_attention_heads 3: expected a divisor of hidden_size 32"],
    ),
    "groups that do not divide": (
        lambda p: set_json(p / "vae/config.json", norm_num_groups=3),
        ["norm_num_groups 3: expected a divisor of each of block_out_channels [8, 16, 16]"],
    ),
    "components that disagree": (
        lambda p: set_json(p / "transformer/config.json", joint_attention_dim=99),
        ["joint_attention_dim"],
    ),
    "more layers than tensors": (
        lambda p: set_json(p / "transformer/config.json", num_layers=3),
        ["double_blocks", "[2]"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_say_why(copy, case):
    breaks, words = BROKEN[case]
    breaks(copy)
    with pytest.raises(UserError) as error:
        plans(copy)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert all(str(copy) in line for line in error.value.lines)  # each line names its file or folder


def test_a_transformer_without_a_word_about_guidance_has_none(golden, tmp_path):
    copy = shutil.copytree(golden / "schnell", tmp_path / "model")
    without(copy / "transformer/config.json", "guidance_embeds")
    assert not open_checkpoint(model(copy)).components["transformer"].config.guidance_embeds


def test_names_that_are_nothing():
    with pytest.raises(UserError, match="model.pretrained_model_name_or_path.*'nonsense'"):
        find("nonsense", "model.pretrained_model_name_or_path")
    with pytest.raises(UserError, match="somebody/something"):
        find("somebody/something", "k")  # the hub is offline here
    with pytest.raises(UserError, match="model.vae_model_name_or_path.*is not there"):
        find("x" * 300, "model.vae_model_name_or_path")  # longer than a file name may be


def test_digest_sees_one_bit(copy, golden):
    before = open_checkpoint(model(golden / "dev")).digest()
    assert open_checkpoint(model(copy)).digest() == before  # not the place
    path = copy / FLUX
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_checkpoint(model(copy)).digest() != before
