"""Every spelling of an adapter's keys changes the weights that it means by what it means: the merged model is the one
whose checkpoint was changed by the formula, W + scale · alpha / rank · B A, written down here apart from the tables."""

from __future__ import annotations

import json
import shutil

import lora_files as files
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_weights import plans
from test_weights_layouts import FLUX, bfl_flux

from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.lora import adapter, apply
from fluxbatch.models.flux1.lora import LORA
from fluxbatch.types import UserError
from fluxbatch.weights import load

SCALE = 0.75
FILES = {
    "transformer": FLUX,
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}


def read(path, golden, strict=True):
    return adapter.read_adapter(
        adapter.Spec("x", str(path), None, 1.0, True, "lora.x.path"), plans(golden / "dev"), LORA, strict
    )


def base(golden, component):
    """The component's tensors, the transformer's by Black Forest Labs' names."""
    tensors = load_file(golden / "dev" / FILES[component])
    return bfl_flux(tensors) if component == "transformer" else tensors


def check(golden, tmp_path, tensors, changed, component="transformer", scale=SCALE, adapter=None):
    """The adapter merged is the checkpoint with the tensors ``changed``; and they are not what they were."""
    adapter = adapter or read(files.save(tmp_path / "adapter.safetensors", tensors), golden)
    assert not adapter.skipped
    folder = tmp_path / "changed"
    shutil.copytree(golden / "dev", folder)
    whole = base(golden, component)
    assert changed and all(not np.allclose(whole[name], value, atol=1e-3) for name, value in changed.items())
    save_file(
        {name: np.ascontiguousarray(value, np.float32) for name, value in (whole | changed).items()},
        folder / FILES[component],
    )
    edits = apply.Loras((adapter,)).edits(component, (("x", scale),))
    mesh = make_mesh((1, 1))
    got = load.load(plans(golden / "dev")[component], mesh, np.float32, edits=edits)
    wanted = load.load(plans(folder)[component], mesh, np.float32)
    for (keys, a), (_, b) in zip(
        *(nnx.to_flat_state(nnx.state(module, nnx.Param)) for module in (got, wanted)), strict=True
    ):
        assert np.allclose(a[...], b[...], atol=2e-5), keys
    shutil.rmtree(folder)


DOTS = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")
NAMED = ("lora_A.default.weight", "lora_B.default.weight")
BARE = ("lora_A", "lora_B")

# spelling: ends, and module as the file names it → module, rows of it (start, stop, of) that it means
SPELLINGS = {
    "PEFT in diffusers": (
        DOTS,
        {
            "transformer.base_model.model.x_embedder": ("img_in", (0, 1, 1)),
            "transformer.base_model.model.transformer_blocks.1.attn.to_k": ("double_blocks.1.img_attn.qkv", (1, 2, 3)),
            "transformer.base_model.model.single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", (3, 7, 7)),
            "base_model.model.transformer.transformer_blocks.0.attn.add_v_proj": (
                "double_blocks.0.txt_attn.qkv",
                (2, 3, 3),
            ),
        },
    ),
    "PEFT in ComfyUI": (
        DOTS,
        {
            "diffusion_model.base_model.model.double_blocks.0.img_mlp.0": ("double_blocks.0.img_mlp.0", (0, 1, 1)),
            "unet.base_model.model.single_blocks.1.linear2": ("single_blocks.1.linear2", (0, 1, 1)),
        },
    ),
    "diffusers, underscores": (
        KOHYA,
        {
            "transformer_single_transformer_blocks_0_attn_to_k": ("single_blocks.0.linear1", (1, 2, 7)),
            "transformer_single_transformer_blocks_1_proj_out": ("single_blocks.1.linear2", (0, 1, 1)),
            "transformer_transformer_blocks_1_attn_to_q": ("double_blocks.1.img_attn.qkv", (0, 1, 3)),
            "transformer_transformer_blocks_0_ff_context_net_0_proj": ("double_blocks.0.txt_mlp.0", (0, 1, 1)),
            "transformer_context_embedder": ("txt_in", (0, 1, 1)),
        },
    ),
    "compiled": (
        DOTS,
        {
            "_orig_mod.transformer_blocks.0.attn.to_v": ("double_blocks.0.img_attn.qkv", (2, 3, 3)),
            "transformer._orig_mod.transformer_blocks.1.attn.to_v": ("double_blocks.1.img_attn.qkv", (2, 3, 3)),
            "base_model.model._orig_mod.single_transformer_blocks.1.attn.to_q": ("single_blocks.1.linear1", (0, 1, 7)),
            "transformer.single_transformer_blocks.0._orig_mod.norm.linear": (
                "single_blocks.0.modulation.lin",
                (0, 1, 1),
            ),
        },
    ),
    "compiled, underscores": (
        KOHYA,
        {
            "lora_unet__orig_mod_double_blocks_0_img_attn_qkv": ("double_blocks.0.img_attn.qkv", (0, 1, 1)),
            "lora_unet_single_blocks_1__orig_mod_linear1": ("single_blocks.1.linear1", (0, 1, 1)),
        },
    ),
    "sharded": (
        NAMED,
        {
            "module.transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj", (0, 1, 1)),
            "base_model.model.module.transformer_blocks.1.norm1.linear": ("double_blocks.1.img_mod.lin", (0, 1, 1)),
            "_fsdp_wrapped_module.single_transformer_blocks.0._fsdp_wrapped_module.attn.to_v": (
                "single_blocks.0.linear1",
                (2, 3, 7),
            ),
            "transformer.transformer_blocks.0._checkpoint_wrapped_module.ff.net.2": (
                "double_blocks.0.img_mlp.2",
                (0, 1, 1),
            ),
        },
    ),
    "kohya of a whole checkpoint": (
        KOHYA,
        {
            "lora_unet_model_diffusion_model_double_blocks_0_txt_attn_qkv": ("double_blocks.0.txt_attn.qkv", (0, 1, 1)),
            "lora_unet_model_diffusion_model_single_blocks_1_linear1": ("single_blocks.1.linear1", (0, 1, 1)),
            "lora_unet_diffusion_model_img_in": ("img_in", (0, 1, 1)),
            "model_diffusion_model_final_layer_adaLN_modulation_1": ("final_layer.adaLN_modulation.1", (0, 1, 1)),
        },
    ),
    "kohya outside the blocks": (
        KOHYA,
        {
            f"lora_unet_{name.replace('.', '_')}": (name, (0, 1, 1))
            for name in (
                "img_in",
                "txt_in",
                "time_in.in_layer",
                "vector_in.out_layer",
                "guidance_in.in_layer",
                "final_layer.linear",
                "final_layer.adaLN_modulation.1",
            )
        },
    ),
    "DiffSynth": (
        NAMED,
        {
            "blocks.0.attn.a_to_qkv": ("double_blocks.0.img_attn.qkv", (0, 1, 1)),
            "blocks.1.attn.b_to_qkv": ("double_blocks.1.txt_attn.qkv", (0, 1, 1)),
            "blocks.0.attn.a_to_out": ("double_blocks.0.img_attn.proj", (0, 1, 1)),
            "blocks.0.attn.b_to_out": ("double_blocks.0.txt_attn.proj", (0, 1, 1)),
            "blocks.0.norm1_a.linear": ("double_blocks.0.img_mod.lin", (0, 1, 1)),
            "blocks.1.norm1_b.linear": ("double_blocks.1.txt_mod.lin", (0, 1, 1)),
            "blocks.1.ff_a.0": ("double_blocks.1.img_mlp.0", (0, 1, 1)),
            "blocks.1.ff_b.2": ("double_blocks.1.txt_mlp.2", (0, 1, 1)),
            "single_blocks.0.to_qkv_mlp": ("single_blocks.0.linear1", (0, 1, 1)),
            "single_blocks.1.proj_out": ("single_blocks.1.linear2", (0, 1, 1)),
            "single_blocks.0.norm.linear": ("single_blocks.0.modulation.lin", (0, 1, 1)),
            "time_embedder.timestep_embedder.0": ("time_in.in_layer", (0, 1, 1)),
            "guidance_embedder.timestep_embedder.2": ("guidance_in.out_layer", (0, 1, 1)),
            "pooled_text_embedder.2": ("vector_in.out_layer", (0, 1, 1)),
            "context_embedder": ("txt_in", (0, 1, 1)),
            "final_proj_out": ("final_layer.linear", (0, 1, 1)),
        },
    ),
    "DiffSynth in its pipeline": (
        DOTS,
        {"pipe.dit.blocks.1.attn.a_to_qkv": ("double_blocks.1.img_attn.qkv", (0, 1, 1))},
    ),
    "without weight": (
        BARE,
        {"diffusion_model.double_blocks.0.img_attn.proj": ("double_blocks.0.img_attn.proj", (0, 1, 1))},
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_changes_what_it_means(golden, tmp_path, name):
    (down, up), modules = SPELLINGS[name]
    maker, whole = files.Maker(len(name)), base(golden, "transformer")
    tensors, changed = {}, {}
    for i, (key, (module, (start, stop, of))) in enumerate(modules.items()):
        weight = changed.get(f"{module}.weight", whole[f"{module}.weight"]).copy()
        first, last, rank = len(weight) * start // of, len(weight) * stop // of, 2 + i % 2
        a, b = maker.normal(rank, weight.shape[1]), maker.normal(last - first, rank)
        tensors |= {f"{key}.{down}": a, f"{key}.{up}": b}
        factor = 1.0
        if i % 2 == 0:
            tensors[f"{key}.alpha"], factor = np.float32(5).reshape(()), 5 / rank
        weight[first:last] += SCALE * factor * b @ a
        changed[f"{module}.weight"] = weight
    check(golden, tmp_path, tensors, changed)


def test_diffsynth_has_the_last_scale_before_the_shift(golden, tmp_path):
    """As diffusers; Black Forest Labs have them the other way round."""
    maker, name = files.Maker(0), "final_layer.adaLN_modulation.1.weight"
    weight = base(golden, "transformer")[name]
    a, b = maker.normal(2, weight.shape[1]), maker.normal(len(weight), 2)
    scale, shift = np.split(SCALE * b @ a, 2)
    tensors = {"final_norm_out.linear.lora_A.default.weight": a, "final_norm_out.linear.lora_B.default.weight": b}
    check(golden, tmp_path, tensors, {name: weight + np.concatenate([shift, scale])})


@pytest.mark.parametrize(
    "component,prefixes,module",
    [
        (
            "text_encoder",
            (
                "text_encoder.",
                "text_encoder.base_model.model.",
                "base_model.model.text_encoder.",
                "text_encoders.clip_l.transformer.",
                "text_encoder._orig_mod.",
                "text_encoder_",
                "lora_te1_",
            ),
            "text_model.encoder.layers.1.self_attn.v_proj",
        ),
        (
            "text_encoder_2",
            (
                "text_encoder_2.",
                "text_encoder_2.base_model.model.",
                "text_encoders.t5xxl.transformer.",
                "text_encoder_2_",
                "lora_te3_",
            ),
            "encoder.block.1.layer.1.DenseReluDense.wi_1",
        ),
    ],
)
def test_spellings_of_the_text_encoders(golden, tmp_path, component, prefixes, module):
    maker = files.Maker(0)
    weight = next(
        value
        for name, value in base(golden, component).items()
        if name.endswith(f"{module}.weight".removeprefix("text_model."))
    )
    name = next(
        name for name in base(golden, component) if name.endswith(f"{module}.weight".removeprefix("text_model."))
    )
    a, b = maker.normal(2, weight.shape[1]), maker.normal(len(weight), 2)
    adapters = []
    for prefix in prefixes:
        key = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        adapters.append(
            read(files.save(tmp_path / "x.safetensors", {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}), golden)
        )
    for one in adapters:
        assert one.changes.keys() == {component}
        (location, delta), (first, other) = (next(iter(each.changes[component].items())) for each in (one, adapters[0]))
        assert location == first and np.array_equal(delta.full(), other.full())
    check(golden, tmp_path, None, {name: weight + SCALE * b @ a}, component, adapter=adapters[0])


def test_what_peft_says_of_wrapped_modules(golden, tmp_path):
    """Its patterns name modules with the wrapper or without it."""
    key = "base_model.model._orig_mod.transformer_blocks.0.attn.to_q"
    tensors = {
        f"{key}.lora_A.weight": np.ones((4, 32), np.float32),
        f"{key}.lora_B.weight": np.ones((32, 4), np.float32),
    }
    file = files.save(tmp_path / "adapter_model.safetensors", tensors)
    for pattern in ("transformer_blocks.0.attn.to_q", "_orig_mod.transformer_blocks.0.attn.to_q", "to_q"):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"r": 4, "lora_alpha": 16, "alpha_pattern": {pattern: 2}})
        )
        (delta,) = read(file, golden).changes["transformer"].values()
        assert delta.scale == 2 / 4, pattern


def test_what_comfyui_sets_and_adds(golden, tmp_path):
    """Whole values for weights, norms and biases; differences of them."""
    maker, whole = files.Maker(1), base(golden, "transformer")
    names = {
        "set": (
            "double_blocks.0.img_attn.norm.key_norm.scale",
            "double_blocks.1.txt_attn.norm.query_norm.scale",
            "single_blocks.0.linear1.weight",
            "img_in.bias",
        ),
        "add": (
            "single_blocks.1.norm.query_norm.scale",
            "double_blocks.0.txt_attn.qkv.weight",
            "double_blocks.0.txt_attn.qkv.bias",
            "txt_in.bias",
        ),
    }
    value = {name: maker.normal(*whole[name].shape) for kind in names.values() for name in kind}
    tensors = {f"diffusion_model.{name.removesuffix('.weight')}.set_weight": value[name] for name in names["set"]}
    first, second, third, fourth = names["add"]
    tensors |= {
        f"diffusion_model.{first}.diff": value[first],
        f"diffusion_model.{second.removesuffix('.weight')}.diff": value[second],
        f"diffusion_model.{third.removesuffix('.bias')}.diff_b": value[third],
        f"diffusion_model.{fourth}.diff": value[fourth],
    }
    changed = {name: value[name] for name in names["set"]} | {name: whole[name] + value[name] for name in names["add"]}
    check(golden, tmp_path, tensors, changed, scale=1.0)
    half = changed | {name: whole[name] + value[name] / 2 for name in names["add"]}
    check(golden, tmp_path, tensors, half, scale=0.5)


def test_a_weight_that_would_have_to_grow(golden, tmp_path):
    """ComfyUI's reshape_weight is of Control LoRAs; where it is the model's own shape there is nothing to do."""
    maker, weight = files.Maker(0), base(golden, "transformer")["img_in.weight"]
    a, b = maker.normal(2, weight.shape[1]), maker.normal(len(weight), 2)
    tensors = {"diffusion_model.img_in.lora_A.weight": a, "diffusion_model.img_in.lora_B.weight": b}
    shape = {"diffusion_model.img_in.reshape_weight": np.array(weight.shape)}
    check(golden, tmp_path, tensors | shape, {"img_in.weight": weight + SCALE * b @ a})
    with pytest.raises(UserError, match=r"img_in: reshape_weight \[32, 32\], the change has \[32, 16\]"):
        read(
            files.save(
                tmp_path / "x.safetensors", tensors | {"diffusion_model.img_in.reshape_weight": np.array([32, 32])}
            ),
            golden,
        )


@pytest.mark.parametrize(
    "module", ["double_blocks.1.img_attn.qkv", "single_blocks.0.linear1", "double_blocks.0.img_mlp.2"]
)
def test_dora_with_a_length_for_each_input(golden, tmp_path, module):
    """Of fused layers it is the whole's columns that get the lengths, not each part's."""
    maker, weight = files.Maker(3), base(golden, "transformer")[f"{module}.weight"]
    a, b, lengths = (
        maker.normal(2, weight.shape[1]),
        maker.normal(len(weight), 2),
        np.abs(maker.normal(1, weight.shape[1])) + 1,
    )
    key = f"lora_unet_{module.replace('.', '_')}"
    tensors = {
        f"{key}.lora_down.weight": a,
        f"{key}.lora_up.weight": b,
        f"{key}.alpha": np.float32(4).reshape(()),
        f"{key}.dora_scale": lengths,
    }
    new = weight + 4 / 2 * b @ a
    new = lengths * new / np.linalg.norm(new, axis=0, keepdims=True)
    check(golden, tmp_path, tensors, {f"{module}.weight": new}, scale=1.0)
    check(golden, tmp_path, tensors, {f"{module}.weight": weight + 0.5 * (new - weight)}, scale=0.5)


# ---- what ComfyUI saves of text encoders: pairs for embeddings, zeros where nothing was trained ----

CLIP, T5 = "text_encoders.clip_l.transformer.text_model.embeddings.", "text_encoders.t5xxl.transformer."
EMBEDDINGS = {
    f"{CLIP}position_embedding": ("text_encoder", "embeddings.position_embedding.weight"),
    f"{CLIP}token_embedding": ("text_encoder", "embeddings.token_embedding.weight"),
    f"{T5}shared": ("text_encoder_2", "shared.weight"),
    f"{T5}encoder.block.0.layer.0.SelfAttention.relative_attention_bias": (
        "text_encoder_2",
        "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
}


def found(golden, component, end):
    return next((name, value) for name, value in base(golden, component).items() if name.endswith(end))


def test_zeros_change_nothing(golden, tmp_path):
    """Neither of embeddings nor of what FLUX does not have; and they are no reason to mix the adapter with no other."""
    maker = files.Maker(0)
    plain = maker.peft({"diffusion_model.double_blocks.0.img_attn.proj": (32, 32)})
    zeros = {f"{CLIP}token_embedding.diff": np.zeros_like(found(golden, "text_encoder", "token_embedding.weight")[1])}
    for i, (key, (component, end)) in enumerate(list(EMBEDDINGS.items())):
        if "token_embedding" not in key:
            rows, columns = found(golden, component, end)[1].shape
            pair = [
                np.zeros((rows + i % 2, 4), np.float16),
                maker.normal(4, columns),
            ]  # of another model's size, for all that zeros do
            zeros |= {f"{key}.lora_up.weight": pair[0], f"{key}.lora_down.weight": pair[1]}
    strange = "text_encoders.clip_g.transformer.text_model.embeddings.position_embedding"
    zeros |= {
        f"{strange}.lora_up.weight": np.zeros((77, 4), np.float16),
        f"{strange}.lora_down.weight": np.ones((4, 8), np.float16),
    }
    adapter = read(files.save(tmp_path / "x.safetensors", plain | zeros), golden)
    alone = read(files.save(tmp_path / "y.safetensors", plain), golden)
    assert adapter.changes.keys() == alone.changes.keys() == {"transformer"} and adapter.merged_only is None
    assert len(adapter.zeros) == 5 and not adapter.skipped and not alone.zeros
    (remark,) = [line for line in adapter.table() if "zeros, which change nothing, are left out" in line]
    assert strange in remark and "and 2 more" in remark
    with pytest.raises(UserError, match=f"leads nowhere in this model: {strange}.lora_down.weight"):
        read(
            files.save(
                tmp_path / "x.safetensors", plain | zeros | {f"{strange}.lora_up.weight": np.ones((77, 4), np.float16)}
            ),
            golden,
        )
    with pytest.raises(UserError, match="holds no adapter for this model"):
        read(files.save(tmp_path / "x.safetensors", zeros), golden)


@pytest.mark.parametrize("key", EMBEDDINGS)
def test_embeddings_are_changed_where_they_are_not_zeros(golden, tmp_path, key):
    component, end = EMBEDDINGS[key]
    name, weight = found(golden, component, end)
    maker = files.Maker(0)
    a, b = maker.normal(2, weight.shape[1]), maker.normal(len(weight), 2)
    tensors = {f"{key}.lora_up.weight": b, f"{key}.lora_down.weight": a}
    adapter = read(files.save(tmp_path / "x.safetensors", tensors), golden)
    assert (
        adapter.merged_only == "it changes an embedding"
        and sum(part.parameters for part in adapter.parts) == a.size + b.size
    )
    check(golden, tmp_path, tensors, {name: weight + SCALE * b @ a}, component)
