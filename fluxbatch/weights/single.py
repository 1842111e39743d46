"""What a file of weights is and how large its model is, from keys and shapes alone.

Black Forest Labs and ComfyUI ship single files without configs: a transformer, a VAE, a text encoder, or
all four under prefixes in one file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from fluxbatch.types import UserError
from fluxbatch.weights import tables
from fluxbatch.weights.rules import Table, split_layer
from fluxbatch.weights.source import Tensor

Tensors = Mapping[str, Tensor]

# What a component's names may begin with in a file: none, or its place in a whole.
PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model."),
    "text_encoder": ("", "text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "clip_l.transformer.", "clip_l."),
    "text_encoder_2": ("", "text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "t5xxl.transformer.", "t5xxl."),
    "vae": ("", "vae.", "first_stage_model."),
}
# Leftovers of ComfyUI's text encoders in a whole.
IGNORED = re.compile(r"text_encoders\.\w+\.(logit_scale|text_projection(\.weight)?)")


def _bfl_levels(names: Tensors) -> Table:
    return tables.vae_bfl(1 + max((int(m[1]) for name in names if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=-1))


# A name that only this naming of the component has, and its table.
NAMINGS: dict[str, tuple[tuple[str, Callable[[Tensors], Table]], ...]] = {
    "transformer": (("img_in.weight", lambda _: tables.FLUX_BFL), ("x_embedder.weight", lambda _: tables.FLUX_DIFFUSERS)),
    "text_encoder": tuple((f"{p}embeddings.token_embedding.weight", lambda _: tables.CLIP) for p in ("text_model.", "")),
    "text_encoder_2": (("encoder.final_layer_norm.weight", lambda _: tables.T5),),
    "vae": (("decoder.norm_out.weight", _bfl_levels), ("decoder.conv_norm_out.weight", lambda _: tables.VAE_DECODER)),
}


def recognise(component: str, tensors: Tensors) -> tuple[dict[str, Tensor], Table, str] | None:
    """The component's tensors without their prefix, their table and the prefix; None if it is not there."""
    for prefix in PREFIXES[component]:
        for sign, table in NAMINGS[component]:
            if prefix + sign in tensors:
                own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
                if component == "text_encoder_2" and "shared.weight" not in own and "encoder.embed_tokens.weight" in own:
                    own["shared.weight"] = own.pop("encoder.embed_tokens.weight")  # the same table, saved under its other name
                return own, table(own), prefix
    return None


def check_whole(tensors: Tensors, prefixes: list[str], where: str) -> None:
    """UserError for names in a whole that belong to no component."""
    strange = [name for name in tensors if not name.startswith(tuple(prefixes)) and not IGNORED.fullmatch(name)]
    if strange:
        raise UserError(f"{where}: {len(strange)} tensors belong to no component, the first is {strange[0]}")


def sizes(component: str, tensors: Tensors, table: Table) -> dict[str, Any]:
    """The entries of the component's ``config.json`` that shapes give away.

    Raises KeyError for a parameter that is not there, ValueError for a model this cannot be.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    layers: dict[str, int] = {}
    rules = [(re.compile(rule.pattern), rule.target) for rule in table.rules]
    for name, tensor in tensors.items():
        for pattern, target in rules:
            if match := pattern.fullmatch(name):
                path, layer = split_layer(target.format(*match.groups()))
                shapes.setdefault(path, tensor.shape)
                stack = path.partition(".")[0]
                layers[stack] = max(layers.get(stack, 0), layer + 1)
    return _SIZES[component](shapes, layers)


def _flux(shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, int]) -> dict[str, Any]:
    width, channels = shapes["img_in.kernel"]
    stack = "double_blocks.img" if "double_blocks" in layers else "single_blocks"
    head = shapes[f"{stack}.qkv.query_norm.scale"][0]
    return dict(
        in_channels=channels, out_channels=shapes["final_out.kernel"][0], num_layers=layers.get("double_blocks", 0),
        num_single_layers=layers.get("single_blocks", 0), num_attention_heads=width // head, attention_head_dim=head,
        joint_attention_dim=shapes["txt_in.kernel"][1], pooled_projection_dim=shapes["vector_in.in_layer.kernel"][1],
        guidance_embeds="guidance_in.in_layer.kernel" in shapes)  # fmt: skip


def _clip(shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, int]) -> dict[str, Any]:
    vocabulary, width = shapes["embed.table"]
    return dict(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=shapes["blocks.fc1.kernel"][0],
        num_hidden_layers=layers["blocks"], max_position_embeddings=shapes["positions"][0])  # fmt: skip


def _t5(shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, int]) -> dict[str, Any]:
    vocabulary, width = shapes["embed.table"]
    buckets, heads = shapes["relative_bias"]
    return dict(
        vocab_size=vocabulary, d_model=width, d_kv=shapes["blocks.q.kernel"][0] // heads, d_ff=shapes["blocks.wi_0.kernel"][0],
        num_layers=layers["blocks"], num_heads=heads, relative_attention_num_buckets=buckets)  # fmt: skip


def _vae(shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, int]) -> dict[str, Any]:
    levels = 1 + max((int(m[1]) for path in shapes if (m := re.match(r"up\.(\d+)\.", path))), default=-1)
    blocks = 1 + max((int(m[1]) for path in shapes if (m := re.match(r"up\.0\.block\.(\d+)\.", path))), default=-1)
    if not levels or not blocks:
        raise KeyError("decoder.up")
    return dict(
        latent_channels=shapes["conv_in.kernel"][1], layers_per_block=blocks - 1,
        block_out_channels=[shapes[f"up.{i}.block.0.conv1.kernel"][0] for i in reversed(range(levels))],
        mid_block_add_attention="mid.attn_1.q.kernel" in shapes, use_quant_conv=False,
        use_post_quant_conv="post_quant.kernel" in shapes)  # fmt: skip


_SIZES = {"transformer": _flux, "text_encoder": _clip, "text_encoder_2": _t5, "vae": _vae}


def constants(component: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes do not say and no config beside the file does: FLUX.1's published values.

    Raises ValueError when the sizes are not FLUX.1's, so that the values would be a guess.
    """
    width = {"transformer": "attention_head_dim", "text_encoder": "hidden_size", "vae": "latent_channels"}
    values: dict[str, tuple[int, dict[str, Any]]] = {
        "transformer": (128, dict(axes_dims_rope=(16, 56, 56))),
        "text_encoder": (768, dict(num_attention_heads=12, hidden_act="quick_gelu", eos_token_id=2)),
        "vae": (16, dict(norm_num_groups=32, scaling_factor=0.3611, shift_factor=0.1159)),
    }
    if component == "text_encoder_2":
        return dict(feed_forward_proj="gated-gelu")
    expected, known = values[component]
    if (got := sizes[width[component]]) != expected:
        raise ValueError(f"{width[component]} is {got}, FLUX.1's is {expected}: put the model's config.json beside the file, "
                         f"for {', '.join(known)}")  # fmt: skip
    return known


def schedule(guidance: bool) -> dict[str, Any]:
    """FLUX.1's published ``scheduler_config.json``: dev shifts by image size, schnell does not."""
    return dict(use_dynamic_shifting=guidance, shift=3.0 if guidance else 1.0, base_shift=0.5, max_shift=1.15,
                base_image_seq_len=256, max_image_seq_len=4096)  # fmt: skip
