"""Names of Z-Image's weights in checkpoints, one table per component and naming, and the sizes that shapes give away.

Targets are the attribute paths of this folder's modules; ``name[{0}]`` is a layer of a stack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fluxbatch.models.flux2 import keys
from fluxbatch.models.flux2.keys import Shapes, Tensors, plain, published
from fluxbatch.models.key_tables import Rule, Table, linear, norm

STACKS = {"context_refiner": "text_blocks", "noise_refiner": "image_blocks", "layers": "joint_blocks"}
NORMS = {
    "attention_norm1": "attention_in_norm",
    "attention_norm2": "attention_out_norm",
    "ffn_norm1": "mlp_in_norm",
    "ffn_norm2": "mlp_out_norm",
}
MLP = {"w1": "mlp_gate", "w2": "mlp_out", "w3": "mlp_up"}


def _common(embedder: str, final: str) -> tuple[Rule, ...]:
    blocks = [(rf"{name}\.(\d+)\.", f"{stack}[{{0}}].") for name, stack in STACKS.items()]
    return (
        *linear(embedder, "img_in"),
        *norm(r"cap_embedder\.0", "txt_norm", bias=False),
        *linear(r"cap_embedder\.1", "txt_in"),
        Rule("x_pad_token", "img_pad"),
        Rule("cap_pad_token", "txt_pad"),
        *linear(r"t_embedder\.mlp\.0", "time_in.in_layer"),
        *linear(r"t_embedder\.mlp\.2", "time_in.out_layer"),
        *linear(rf"{final}\.adaLN_modulation\.1", "final_mod"),
        *linear(rf"{final}\.linear", "final_out"),
        *(r for src, dst in blocks for name, to in NORMS.items() for r in norm(src + name, dst + to, bias=False)),
        *(r for src, dst in blocks for name, to in MLP.items() for r in plain(rf"{src}feed_forward\.{name}", dst + to)),
        *(r for src, dst in blocks for r in linear(src + r"adaLN_modulation\.0", dst + "mod")),
    )


def _attention(q_norm: str, k_norm: str, out: str) -> tuple[Rule, ...]:
    return tuple(
        rule
        for name, stack in STACKS.items()
        for src, dst in [(rf"{name}\.(\d+)\.attention\.", f"{stack}[{{0}}].")]
        for rule in (
            *norm(src + q_norm, dst + "qkv.query_norm", bias=False),
            *norm(src + k_norm, dst + "qkv.key_norm", bias=False),
            *plain(src + out, dst + "proj"),
        )
    )


def _each(pattern: str, thirds: bool) -> tuple[Rule, ...]:
    """Queries, keys and values: of tensors of their own, or of thirds of one."""
    return tuple(
        rule
        for name, stack in STACKS.items()
        for i, n in enumerate("qkv")
        for rule in plain(
            rf"{name}\.(\d+)\.attention\.{pattern.format(n)}",
            f"{stack}[{{0}}].qkv.{n}",
            ((i, i + 1, 3),) if thirds else ((0, 1, 1),),
        )
    )


TRANSFORMER_DIFFUSERS = Table(
    (
        *_common(r"all_x_embedder\.2-1", r"all_final_layer\.2-1"),
        *_attention("norm_q", "norm_k", r"to_out\.0"),
        *_each("to_{}", thirds=False),
    )
)
# The authors' own names, in ComfyUI's files too
TRANSFORMER_ORIGINAL = Table(
    (
        *_common("x_embedder", "final_layer"),
        *_attention("q_norm", "k_norm", "out"),
        *_each("qkv", thirds=True),
    ),
    ignored=(r"norm_final\.weight",),
)


def qwen3_of(tensors: Tensors) -> Table:
    """The language model up to its last layer but one, of as many as there are."""
    places = (re.match(r"(?:model\.)?layers\.(\d+)\.", name) for name in tensors)
    count = 1 + max((int(match[1]) for match in places if match), default=0)
    return keys.decoder((max(count - 1, 1),), r"(?:model\.)?", (r"lm_head\.weight",))


def transformer_sizes(shapes: Shapes, layers: Mapping[str, int]) -> dict[str, Any]:
    """The entries of ``transformer/config.json`` that a single file's shapes give away. ``layers``: of each stack."""
    width, patch = shapes["img_in.kernel"]
    stack = "joint_blocks" if "joint_blocks" in layers else "image_blocks"
    return dict(
        in_channels=patch // 4, dim=width, n_layers=layers.get("joint_blocks", 0),
        n_refiner_layers=layers.get("image_blocks", 0),
        n_heads=width // shapes[f"{stack}.qkv.query_norm.scale"][0], cap_feat_dim=shapes["txt_in.kernel"][1],
    )  # fmt: skip


# What shapes do not say, as published.


def transformer_constants(sizes: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(norm_eps=1e-5, rope_theta=256.0, axes_dims=(32, 48, 48), axes_lens=(1024, 512, 512))
    return published(sizes, "dim", 3840, values, "Z-Image")


def qwen3_constants(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return published(sizes, "vocab_size", 151936, dict(rms_norm_eps=1e-6, rope_theta=1_000_000.0), "Z-Image")
