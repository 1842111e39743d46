"""Names of FLUX.2's weights in checkpoints, one table per component and naming, and the sizes that shapes give away.

Targets are the attribute paths of this folder's modules; ``name[{0}]`` is a layer of a stack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fluxbatch.models import autoencoder_keys
from fluxbatch.models.autoencoder_keys import BFL_ENCODER, VAE_DECODER, VAE_ENCODER, vae_bfl
from fluxbatch.models.flux2 import mistral, qwen3
from fluxbatch.models.key_tables import SWAP_HALVES, Rows, Rule, Table, linear, norm

Shapes = Mapping[str, tuple[int, ...]]  # of our parameters, one layer's where they are stacked
Tensors = Mapping[str, Any]  # with shapes

GATE, UP = ((0, 1, 2),), ((1, 2, 2),)  # SwiGLU's halves
PUBLISHED = (1, 3)  # widths of the model and of its MLPs, in units of the model's
_SINGLE_TO = "single_blocks[{0}]."


def plain(pattern: str, target: str, rows: tuple[Rows, ...] = ((0, 1, 1),)) -> tuple[Rule, ...]:
    return linear(pattern, target, rows, bias=False)


def gated(pattern: str, target: str) -> tuple[Rule, ...]:
    return *plain(pattern, f"{target}mlp_gate", GATE), *plain(pattern, f"{target}mlp_up", UP)


def _fused(pattern: str, sizes: tuple[int, int]) -> tuple[Rule, ...]:
    """A single block's first layers in one: q, k, v and the MLP's two halves."""
    width, hidden = sizes
    ends, total = [0, width, 2 * width, 3 * width, 3 * width + hidden], 3 * width + 2 * hidden
    names = "qkv.q", "qkv.k", "qkv.v", "mlp_gate", "mlp_up"
    parts = zip(names, ends, [*ends[1:], total], strict=True)
    return tuple(rule for name, a, b in parts for rule in plain(pattern, _SINGLE_TO + name, ((a, b, total),)))


def _diffusers_stream(
    stream: str, q: str, k: str, v: str, norms: tuple[str, str], proj: str, ff: str
) -> tuple[Rule, ...]:
    src, dst = r"transformer_blocks\.(\d+)\.", f"double_blocks[{{0}}].{stream}."
    return (
        *(r for name, n in ((q, "q"), (k, "k"), (v, "v")) for r in plain(src + rf"attn\.{name}", dst + f"qkv.{n}")),
        *norm(src + rf"attn\.{norms[0]}", dst + "qkv.query_norm", bias=False),
        *norm(src + rf"attn\.{norms[1]}", dst + "qkv.key_norm", bias=False),
        *plain(src + rf"attn\.{proj}", dst + "proj"),
        *gated(src + rf"{ff}\.linear_in", dst),
        *plain(src + rf"{ff}\.linear_out", dst + "mlp_out"),
    )


def transformer_diffusers(sizes: tuple[int, int] = PUBLISHED) -> Table:
    """``sizes``: widths of the model and of its MLPs, in any unit."""
    single, embed = r"single_transformer_blocks\.(\d+)\.attn\.", r"time_guidance_embed\."
    return Table(
        (
            *plain("x_embedder", "img_in"),
            *plain("context_embedder", "txt_in"),
            *(
                r
                for name, n in (("timestep", "time_in"), ("guidance", "guidance_in"))
                for i, layer in enumerate(("in_layer", "out_layer"), 1)
                for r in plain(embed + rf"{name}_embedder\.linear_{i}", f"{n}.{layer}")
            ),
            *plain(r"double_stream_modulation_img\.linear", "img_mod"),
            *plain(r"double_stream_modulation_txt\.linear", "txt_mod"),
            *plain(r"single_stream_modulation\.linear", "single_mod"),
            *_diffusers_stream("img", "to_q", "to_k", "to_v", ("norm_q", "norm_k"), r"to_out\.0", "ff"),
            *_diffusers_stream(
                "txt",
                "add_q_proj",
                "add_k_proj",
                "add_v_proj",
                ("norm_added_q", "norm_added_k"),
                "to_add_out",
                "ff_context",
            ),
            *_fused(single + "to_qkv_mlp_proj", sizes),
            *plain(single + "to_out", _SINGLE_TO + "out"),
            *norm(single + "norm_q", _SINGLE_TO + "qkv.query_norm", bias=False),
            *norm(single + "norm_k", _SINGLE_TO + "qkv.key_norm", bias=False),
            # diffusers stores scale, shift; the model (like BFL) has shift, scale
            *plain(r"norm_out\.linear", "final_mod", SWAP_HALVES),
            *plain("proj_out", "final_out"),
        )
    )


def scale(pattern: str, target: str) -> Rule:
    return Rule(rf"{pattern}\.(?:scale|weight)", f"{target}.scale")


def _bfl_stream(stream: str) -> tuple[Rule, ...]:
    src, dst = rf"double_blocks\.(\d+)\.{stream}_", f"double_blocks[{{0}}].{stream}."
    return (
        *(r for i, n in enumerate("qkv") for r in plain(src + r"attn\.qkv", dst + f"qkv.{n}", ((i, i + 1, 3),))),
        scale(src + r"attn\.norm\.query_norm", dst + "qkv.query_norm"),
        scale(src + r"attn\.norm\.key_norm", dst + "qkv.key_norm"),
        *plain(src + r"attn\.proj", dst + "proj"),
        *gated(src + r"mlp\.0", dst),
        *plain(src + r"mlp\.2", dst + "mlp_out"),
    )


def transformer_bfl(sizes: tuple[int, int] = PUBLISHED) -> Table:
    """Black Forest Labs' own files, and ComfyUI's. ``sizes`` as above."""
    single = r"single_blocks\.(\d+)\."
    return Table(
        (
            *(r for n in ("img_in", "txt_in") for r in plain(n, n)),
            *(
                r
                for n in ("time_in", "guidance_in")
                for part in ("in_layer", "out_layer")
                for r in plain(rf"{n}\.{part}", f"{n}.{part}")
            ),
            *plain(r"double_stream_modulation_img\.lin", "img_mod"),
            *plain(r"double_stream_modulation_txt\.lin", "txt_mod"),
            *plain(r"single_stream_modulation\.lin", "single_mod"),
            *_bfl_stream("img"),
            *_bfl_stream("txt"),
            *_fused(single + "linear1", sizes),
            *plain(single + "linear2", _SINGLE_TO + "out"),
            scale(single + r"norm\.query_norm", _SINGLE_TO + "qkv.query_norm"),
            scale(single + r"norm\.key_norm", _SINGLE_TO + "qkv.key_norm"),
            *plain(r"final_layer\.adaLN_modulation\.1", "final_mod"),
            *plain(r"final_layer\.linear", "final_out"),
        )
    )


def sizes_of(tensors: Tensors) -> tuple[int, int]:
    """Widths of a transformer and of its MLPs, from what either naming calls its single blocks' last layer."""
    found = (
        tensors.get(name)
        for name in ("single_transformer_blocks.0.attn.to_out.weight", "single_blocks.0.linear2.weight")
    )
    last = next((tensor for tensor in found if tensor is not None and len(tensor.shape) == 2), None)
    return PUBLISHED if last is None else (last.shape[0], last.shape[1] - last.shape[0])


def diffusers_of(tensors: Tensors) -> Table:
    return transformer_diffusers(sizes_of(tensors))


def bfl_of(tensors: Tensors) -> Table:
    return transformer_bfl(sizes_of(tensors))


def decoder(layers: tuple[int, ...], prefix: str, ignored: tuple[str, ...] = ()) -> Table:
    """A language model as transformers names it, up to the last of the ``layers`` whose states are read."""
    count = max(layers)
    read = "|".join(map(str, range(count)))
    src, dst = prefix + rf"layers\.({read})\.", "blocks[{0}]."
    attn, mlp = src + r"self_attn\.", src + r"mlp\."
    return Table(
        (
            Rule(prefix + r"embed_tokens\.weight", "embed.table"),
            *norm(src + "input_layernorm", dst + "norm1", bias=False),
            *norm(src + "post_attention_layernorm", dst + "norm2", bias=False),
            *(r for n in "qkvo" for r in plain(attn + f"{n}_proj", dst + n)),
            *norm(attn + "q_norm", dst + "query_norm", bias=False),
            *norm(attn + "k_norm", dst + "key_norm", bias=False),
            *(r for n in ("gate", "up", "down") for r in plain(mlp + f"{n}_proj", dst + n)),
        ),
        ignored=(
            prefix + rf"layers\.(?!(?:{read})\.)\d+\..*",
            prefix + r"norm\.weight",
            r".*rotary_emb\.inv_freq",
            *ignored,
        ),
    )


QWEN3 = decoder(qwen3.LAYERS, r"(?:model\.)?", (r"lm_head\.weight",))
# transformers 5 and 4 differ in where the language model is; what sees pictures is not read
MISTRAL = decoder(
    mistral.LAYERS,
    r"(?:model\.language_model\.|language_model\.model\.|model\.)?",
    (
        r"(?:language_model\.)?lm_head\.weight",
        r"(?:model\.)?vision_tower\..*",
        r"(?:model\.)?multi_modal_projector\..*",
        "tekken_model",
    ),
)

_STATISTICS = Rule(r"bn\.running_mean", "bn.mean"), Rule(r"bn\.running_var", "bn.var")
_BATCHES = r"bn\.num_batches_tracked"

VAE_DECODER_DIFFUSERS = Table((*VAE_DECODER.rules, *_STATISTICS), (*VAE_DECODER.ignored, _BATCHES))
VAE_ENCODER_DIFFUSERS = Table((*VAE_ENCODER.rules, *_STATISTICS), (*VAE_ENCODER.ignored, _BATCHES))


def vae_decoder_bfl(levels: int) -> Table:
    """``ae.safetensors``, ``flux2-vae.safetensors``: as FLUX.1's, the last convolution of the latents with the
    decoder."""
    return Table(
        (*vae_bfl(levels).rules, *linear(r"decoder\.post_quant_conv", "post_quant"), *_STATISTICS),
        (r"encoder\..*", _BATCHES),
    )


def vae_bfl_of(tensors: Tensors) -> Table:
    return vae_decoder_bfl(
        1 + max((int(m[1]) for name in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=-1)
    )


VAE_ENCODER_BFL = Table(
    (*BFL_ENCODER.rules, *linear(r"encoder\.quant_conv", "quant"), *_STATISTICS), (*BFL_ENCODER.ignored, _BATCHES)
)


def transformer_sizes(shapes: Shapes, layers: Mapping[str, int]) -> dict[str, Any]:
    """The entries of ``transformer/config.json`` that a single file's shapes give away. ``layers``: of each stack."""
    width, channels = shapes["img_in.kernel"]
    stack, one = (
        ("double_blocks", "double_blocks.img") if "double_blocks" in layers else ("single_blocks", "single_blocks")
    )
    head, hidden = shapes[f"{one}.qkv.query_norm.scale"][0], _hidden(shapes, stack)
    return dict(
        in_channels=channels, out_channels=shapes["final_out.kernel"][0], num_layers=layers.get("double_blocks", 0),
        num_single_layers=layers.get("single_blocks", 0), num_attention_heads=width // head, attention_head_dim=head,
        joint_attention_dim=shapes["txt_in.kernel"][1], timestep_guidance_channels=shapes["time_in.in_layer.kernel"][1],
        mlp_ratio=hidden / width, guidance_embeds="guidance_in.in_layer.kernel" in shapes)  # fmt: skip


def _hidden(shapes: Shapes, stack: str) -> int:
    if stack == "double_blocks":
        return shapes["double_blocks.img.mlp_out.kernel"][1]
    rows, columns = shapes["single_blocks.out.kernel"]
    return columns - rows


def decoder_sizes(shapes: Shapes, layers: Mapping[str, int]) -> dict[str, Any]:
    """Those of a text encoder's ``config.json``. Layers behind the last one that is read are not counted, but for
    one."""
    vocabulary, width = shapes["embed.table"]
    found = {"head_dim": shapes["blocks.query_norm.scale"][0]} if "blocks.query_norm.scale" in shapes else {}
    head = found.get("head_dim", 128)
    return found | dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes["blocks.gate.kernel"][0],
        num_hidden_layers=layers["blocks"] + 1,
        num_attention_heads=shapes["blocks.q.kernel"][0] // head,
        num_key_value_heads=shapes["blocks.k.kernel"][0] // head,
    )


def vae_sizes(shapes: Shapes, layers: Mapping[str, int]) -> dict[str, Any]:
    return autoencoder_keys.sizes(shapes, layers) | {"use_quant_conv": True}


# What shapes do not say, as published.


def transformer_constants(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return published(sizes, "attention_head_dim", 128, dict(axes_dims_rope=(32, 32, 32, 32), rope_theta=2000))


def qwen3_constants(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return published(sizes, "vocab_size", 151936, dict(rms_norm_eps=1e-6, rope_theta=1_000_000.0))


def mistral_constants(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return published(sizes, "vocab_size", 131072, dict(head_dim=128, rms_norm_eps=1e-5, rope_theta=1_000_000_000.0))


def vae_constants(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return published(sizes, "latent_channels", 32, dict(norm_num_groups=32, batch_norm_eps=1e-4))


def published(
    sizes: Mapping[str, Any], key: str, expected: int, values: dict[str, Any], model: str = "FLUX.2"
) -> dict[str, Any]:
    """A model's published values; ValueError when the sizes are not that model's, so that they would be a guess."""
    if (got := sizes[key]) != expected:
        raise ValueError(
            f"{key} is {got}, {model}'s is {expected}: put the model's config.json beside the file, for "
            f"{', '.join(values)}"
        )
    return values
