"""What shapes say of FLUX.1's components in single files, which come without configs, and what they do not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Layers = Mapping[str, int]


def transformer_sizes(shapes: Shapes, layers: Layers) -> dict[str, Any]:
    width, channels = shapes["img_in.kernel"]
    stack = "double_blocks.img" if "double_blocks" in layers else "single_blocks"
    head = shapes[f"{stack}.qkv.query_norm.scale"][0]
    return dict(
        in_channels=channels, out_channels=shapes["final_out.kernel"][0], num_layers=layers.get("double_blocks", 0),
        num_single_layers=layers.get("single_blocks", 0), num_attention_heads=width // head, attention_head_dim=head,
        joint_attention_dim=shapes["txt_in.kernel"][1], pooled_projection_dim=shapes["vector_in.in_layer.kernel"][1],
        guidance_embeds="guidance_in.in_layer.kernel" in shapes)  # fmt: skip


def clip_sizes(shapes: Shapes, layers: Layers) -> dict[str, Any]:
    vocabulary, width = shapes["embed.table"]
    return dict(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=shapes["blocks.fc1.kernel"][0],
        num_hidden_layers=layers["blocks"], max_position_embeddings=shapes["positions"][0])  # fmt: skip


def t5_sizes(shapes: Shapes, layers: Layers) -> dict[str, Any]:
    vocabulary, width = shapes["embed.table"]
    buckets, heads = shapes["relative_bias"]
    return dict(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes["blocks.q.kernel"][0] // heads,
        d_ff=shapes["blocks.wi_0.kernel"][0],
        num_layers=layers["blocks"],
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


def transformer_constants(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return _published(sizes, "attention_head_dim", 128, dict(axes_dims_rope=(16, 56, 56)))


def clip_constants(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return _published(sizes, "hidden_size", 768, dict(num_attention_heads=12, hidden_act="quick_gelu", eos_token_id=2))


def vae_constants(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return _published(
        sizes, "latent_channels", 16, dict(norm_num_groups=32, scaling_factor=0.3611, shift_factor=0.1159)
    )


def _published(sizes: Mapping[str, Any], key: str, expected: int, values: dict[str, Any]) -> dict[str, Any]:
    """FLUX.1's published values; ValueError when the sizes are not FLUX.1's, so that they would be a guess."""
    if (got := sizes[key]) != expected:
        raise ValueError(
            f"{key} is {got}, FLUX.1's is {expected}: put the model's config.json beside the file, for "
            f"{', '.join(values)}"
        )
    return values
