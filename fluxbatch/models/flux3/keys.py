"""Names of FLUX.3's weights in checkpoints, one table per component and naming, and the sizes that shapes give away.

Targets are the attribute paths of this folder's modules; ``name[{0}]`` is a layer of a stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxbatch.models.flux2 import keys
from fluxbatch.models.flux2.keys import Shapes, gated, plain, published, scale
from fluxbatch.models.flux3 import qwen3vl
from fluxbatch.models.key_tables import SWAP_HALVES, Rule, Table, norm

# A group's name in files → its layers that make modulation, and what embeds its tokens
GROUPS = {"image": ("img_mod", "img_in"), "image_cond": ("ref_mod", "ref_in"), "txt": ("txt_mod", "txt_in")}


def _modulators(linear: str) -> tuple[Rule, ...]:
    return tuple(
        rule
        for group, (target, _) in GROUPS.items()
        for name, part in (("early_stream", "early"), ("single_stream", "joint"))
        for rule in plain(rf"{name}_modulations\.{group}\.{linear}", f"{target}.{part}")
    )


def _diffusers_block(pattern: str, target: str) -> tuple[Rule, ...]:
    src, dst = pattern + r"\.(\d+)\.", target + "[{0}]."
    attn = src + r"attn\."
    return (
        *(rule for n in "qkv" for rule in plain(attn + f"to_{n}", f"{dst}qkv.{n}")),
        *norm(attn + "norm_q", dst + "qkv.query_norm", bias=False),
        *norm(attn + "norm_k", dst + "qkv.key_norm", bias=False),
        *plain(attn + r"to_out\.0", dst + "proj"),
        *gated(src + r"ff\.linear_in", dst),
        *plain(src + r"ff\.linear_out", dst + "mlp_out"),
    )


TRANSFORMER_DIFFUSERS = Table(
    (
        *(
            rule
            for name, target in (("timestep_embedder", "time_in"), ("target_timestep_embedder", "target_in"))
            for i, layer in enumerate(("in_layer", "out_layer"), 1)
            for rule in plain(rf"{name}\.linear_{i}", f"{target}.{layer}")
        ),
        *_modulators("linear"),
        *plain(r"x_embedders\.image", "img_in"),
        *plain(r"x_embedders\.image_cond", "ref_in"),
        *plain("context_embedder", "txt_in"),
        *_diffusers_block("txt_mode_blocks", "text_blocks"),
        *_diffusers_block(r"mode_blocks\.image", "image_blocks"),
        *_diffusers_block(r"mode_blocks\.image_cond", "reference_blocks"),
        *_diffusers_block("single_transformer_blocks", "joint_blocks"),
        # diffusers stores scale, shift; the model (like BFL) has shift, scale
        *plain(r"norm_out\.linear", "final_mod", SWAP_HALVES),
        *plain("proj_out", "final_out"),
    )
)


def _bfl_block(pattern: str, target: str) -> tuple[Rule, ...]:
    src, dst = pattern + r"\.(\d+)\.", target + "[{0}]."
    return (
        *(rule for n in "qkv" for rule in plain(src + f"{n}_proj", f"{dst}qkv.{n}")),
        scale(src + r"norm\.query_norm", dst + "qkv.query_norm"),
        scale(src + r"norm\.key_norm", dst + "qkv.key_norm"),
        *plain(src + "attn_out", dst + "proj"),
        *gated(src + "mlp_in", dst),
        *plain(src + "mlp_out", dst + "mlp_out"),
    )


# Black Forest Labs' own files
TRANSFORMER_BFL = Table(
    (
        *(
            rule
            for name, target in (("time_in", "time_in"), ("ref_time_in", "target_in"))
            for layer in ("in_layer", "out_layer")
            for rule in plain(rf"{name}\.{layer}", f"{target}.{layer}")
        ),
        *_modulators("lin"),
        *plain(r"emb_in\.image", "img_in"),
        *plain(r"emb_in\.image_cond", "ref_in"),
        *plain("txt_in", "txt_in"),
        *_bfl_block("txt_mode_blocks", "text_blocks"),
        *_bfl_block(r"content_mode_blocks\.image", "image_blocks"),
        *_bfl_block(r"content_mode_blocks\.image_cond", "reference_blocks"),
        *_bfl_block("single_blocks", "joint_blocks"),
        *plain(r"final_layer\.image\.adaLN_modulation\.1", "final_mod"),
        *plain(r"final_layer\.image\.linear", "final_out"),
    ),
    ignored=(r"repa_projectors\..*",),  # read in training alone
)

QWEN3_VL = keys.decoder(
    qwen3vl.LAYERS,
    r"(?:model\.language_model\.|language_model\.model\.|model\.)?",
    (r"(?:language_model\.)?lm_head\.weight", r"(?:model\.)?visual\..*"),
)


def transformer_sizes(shapes: Shapes, layers: Mapping[str, int]) -> dict[str, Any]:
    """The entries of ``transformer/config.json`` that a single file's shapes give away. ``layers``: of each stack."""
    width, channels = shapes["img_in.kernel"]
    stack = "joint_blocks" if "joint_blocks" in layers else "image_blocks"
    head, hidden = shapes[f"{stack}.qkv.query_norm.scale"][0], shapes[f"{stack}.mlp_out.kernel"][1]
    return dict(
        in_channels=channels, cond_in_channels=shapes["ref_in.kernel"][1], num_layers=layers.get("image_blocks", 0),
        num_single_layers=layers.get("joint_blocks", 0), num_attention_heads=width // head, attention_head_dim=head,
        joint_attention_dim=shapes["txt_in.kernel"][1], timestep_channels=shapes["time_in.in_layer.kernel"][1],
        mlp_ratio=hidden / width, flow_map="target_in.in_layer.kernel" in shapes)  # fmt: skip


# What shapes do not say, as published.


def transformer_constants(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return published(
        sizes, "attention_head_dim", 128, dict(axes_dims_rope=(32, 32, 32, 32), rope_theta=10_000), "FLUX.3"
    )


def qwen3vl_constants(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return published(sizes, "vocab_size", 151936, dict(rms_norm_eps=1e-6, rope_theta=5_000_000.0), "FLUX.3")
