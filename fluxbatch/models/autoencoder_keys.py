"""Key tables of AutoencoderKL: diffusers' names, and Black Forest Labs' ``ae.safetensors``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fluxbatch.models.key_tables import Naming, Rule, Table, linear, norm


def _vae_half(half: str, levels: str, to: str, sampler: str, resnets: str = "resnets") -> tuple[Rule, ...]:
    rules = [
        *linear(rf"{half}\.conv_in", "conv_in"),
        *linear(rf"{half}\.conv_out", "conv_out"),
        *norm(rf"{half}\.conv_norm_out", "norm_out"),
        *linear(rf"{half}\.{levels}\.(\d+)\.{sampler}\.0\.conv", f"{to}.{{0}}.conv"),
        *norm(rf"{half}\.mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        # the first names are those of diffusers before 0.18
        *linear(rf"{half}\.mid_block\.attentions\.0\.(?:query|to_q)", "mid.attn_1.q"),
        *linear(rf"{half}\.mid_block\.attentions\.0\.(?:key|to_k)", "mid.attn_1.k"),
        *linear(rf"{half}\.mid_block\.attentions\.0\.(?:value|to_v)", "mid.attn_1.v"),
        *linear(rf"{half}\.mid_block\.attentions\.0\.(?:proj_attn|to_out\.0)", "mid.attn_1.out"),
    ]
    blocks = [(rf"{half}\.{levels}\.(\d+)\.{resnets}\.(\d+)", f"{to}.{{0}}.block.{{1}}")]
    blocks += [(rf"{half}\.mid_block\.resnets\.{i}", f"mid.block_{i + 1}") for i in (0, 1)]
    for src, dst in blocks:
        rules += [*norm(rf"{src}\.norm1", f"{dst}.norm1"), *norm(rf"{src}\.norm2", f"{dst}.norm2")]
        rules += [*linear(rf"{src}\.conv1", f"{dst}.conv1"), *linear(rf"{src}\.conv2", f"{dst}.conv2")]
        rules += linear(rf"{src}\.conv_shortcut", f"{dst}.shortcut")
    return tuple(rules)


VAE_DECODER = Table(
    (*_vae_half("decoder", "up_blocks", "up", "upsamplers"), *linear("post_quant_conv", "post_quant")),
    ignored=(r"encoder\..*", r"quant_conv\..*"),
)
VAE_ENCODER = Table(
    (*_vae_half("encoder", "down_blocks", "down", "downsamplers"), *linear("quant_conv", "quant")),
    ignored=(r"decoder\..*", r"post_quant_conv\..*"),
)


def vae_bfl(levels: int) -> Table:
    """``ae.safetensors``: the decoder's resolutions are counted from the finest, ours from the coarsest."""
    rules = [
        *linear(r"decoder\.conv_in", "conv_in"),
        *linear(r"decoder\.conv_out", "conv_out"),
        *norm(r"decoder\.norm_out", "norm_out"),
        *norm(r"decoder\.mid\.attn_1\.norm", "mid.attn_1.norm"),
        *(r for n in "qkv" for r in linear(rf"decoder\.mid\.attn_1\.{n}", f"mid.attn_1.{n}")),
        *linear(r"decoder\.mid\.attn_1\.proj_out", "mid.attn_1.out"),
        *linear("post_quant_conv", "post_quant"),
    ]
    blocks = [(rf"decoder\.mid\.block_{i}", f"mid.block_{i}") for i in (1, 2)]
    for level in range(levels):
        src, dst = rf"decoder\.up\.{levels - 1 - level}", f"up.{level}"
        blocks.append((rf"{src}\.block\.(\d+)", f"{dst}.block.{{0}}"))
        rules += linear(rf"{src}\.upsample\.conv", f"{dst}.conv")
    for src, dst in blocks:
        rules += [*norm(rf"{src}\.norm1", f"{dst}.norm1"), *norm(rf"{src}\.norm2", f"{dst}.norm2")]
        rules += [*linear(rf"{src}\.conv1", f"{dst}.conv1"), *linear(rf"{src}\.conv2", f"{dst}.conv2")]
        rules += linear(rf"{src}\.nin_shortcut", f"{dst}.shortcut")
    return Table(tuple(rules), ignored=(r"encoder\..*", r"quant_conv\..*"))


def _levels(names: Mapping[str, Any]) -> Table:
    return vae_bfl(1 + max((int(m[1]) for name in names if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=-1))


_MID = r"encoder\.mid\.attn_1\."
_BLOCKS = (
    (r"encoder\.down\.(\d+)\.block\.(\d+)\.", "down.{0}.block.{1}."),
    (r"encoder\.mid\.block_(\d)\.", "mid.block_{0}."),
)

BFL_ENCODER = Table(
    (
        *(r for n in ("conv_in", "conv_out") for r in linear(rf"encoder\.{n}", n)),
        *norm(r"encoder\.norm_out", "norm_out"),
        *linear(r"encoder\.down\.(\d+)\.downsample\.conv", "down.{0}.conv"),
        *norm(_MID + "norm", "mid.attn_1.norm"),
        *(r for n in "qkv" for r in linear(_MID + n, f"mid.attn_1.{n}")),
        *linear(_MID + "proj_out", "mid.attn_1.out"),
        *(r for src, dst in _BLOCKS for n in ("norm1", "norm2") for r in norm(src + n, dst + n)),
        *(r for src, dst in _BLOCKS for n in ("conv1", "conv2") for r in linear(src + n, dst + n)),
        *(r for src, dst in _BLOCKS for r in linear(src + "nin_shortcut", dst + "shortcut")),
    ),
    (r"decoder\..*",),
)  # fmt: skip


ENCODER_NAMINGS = (
    Naming("encoder.norm_out.weight", BFL_ENCODER),
    Naming("encoder.conv_norm_out.weight", VAE_ENCODER),
)
NAMINGS = (Naming("decoder.norm_out.weight", _levels), Naming("decoder.conv_norm_out.weight", VAE_DECODER))


def sizes(shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, int]) -> dict[str, Any]:
    levels = 1 + max((int(m[1]) for path in shapes if (m := re.match(r"up\.(\d+)\.", path))), default=-1)
    blocks = 1 + max((int(m[1]) for path in shapes if (m := re.match(r"up\.0\.block\.(\d+)\.", path))), default=-1)
    if not levels or not blocks:
        raise KeyError("decoder.up")
    return dict(
        latent_channels=shapes["conv_in.kernel"][1], layers_per_block=blocks - 1,
        block_out_channels=[shapes[f"up.{i}.block.0.conv1.kernel"][0] for i in reversed(range(levels))],
        mid_block_add_attention="mid.attn_1.q.kernel" in shapes, use_quant_conv=False,
        use_post_quant_conv="post_quant.kernel" in shapes)  # fmt: skip
