"""What FLUX.2's networks cost: floating-point operations, and bytes of activations. Operations are two for each
multiply-add of a matrix product.

All figures are for one image. What is linear in the tokens is not counted, nor are the modulations, one product of a
vector a step. Bytes are estimates of what the compiler keeps alive at the widest point of each program.
"""

from __future__ import annotations

import functools
from typing import Any

from fluxbatch.models.family import Footprint
from fluxbatch.models.flux2.decoder import DecoderConfig
from fluxbatch.models.flux2.transformer import Flux2Config


def linear(cfg: Flux2Config, image: int, text: int, references: int = 0) -> int:
    """A step's linear layers for so many tokens. What embeds text and references is done once a picture, and counted
    here."""
    d, blocks = cfg.width, cfg.num_layers + cfg.num_single_layers
    ends = (
        image * d * (cfg.in_channels + cfg.out_channels)
        + references * d * cfg.in_channels
        + text * cfg.joint_attention_dim * d
    )
    # 4: q, k, v, out; 3: gate, up and down
    return 2 * (blocks * (4 * d * d + 3 * d * cfg.hidden) * (image + references + text) + ends)


def attention(cfg: Flux2Config, image: int, text: int, references: int = 0) -> int:
    """A step's scores and weighted sums."""
    return 4 * (cfg.num_layers + cfg.num_single_layers) * cfg.width * (image + references + text) ** 2


@functools.cache
def step(cfg: Flux2Config, image: int, text: int, references: int = 0) -> int:
    """One evaluation of the transformer; with a negative prompt there are two a step."""
    return linear(cfg, image, text, references) + attention(cfg, image, text, references)


def encode(cfg: DecoderConfig, layers: tuple[int, ...], tokens: int) -> int:
    """Encoding a prompt of ``tokens`` tokens, padding included, through the blocks that are read."""
    d, inner, shared = cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    products = 2 * d * inner + 2 * d * shared + 3 * d * cfg.intermediate_size
    return 2 * max(layers) * tokens * (products + 2 * tokens * inner)


def denoise_bytes(cfg: Any, at: Footprint, tokens: int, text: int, modulation: int = 17, largest: int = 2) -> int:
    """As FLUX.1's: in a single block the sequence and its normed form, and in heads and hidden units q, k, v and the
    MLP's halves; besides what texts are embedded to. ``tokens``: of an image and its references; ``text``: of one.
    ``cfg``: of a model with ``width``, ``hidden`` and ``num_attention_heads``; ``modulation``: of a step, in widths;
    ``largest``: a block of the most weights, in single ones."""
    d, hidden = cfg.width, cfg.hidden
    beside = at.passes * at.images * (at.steps * modulation + text) * d * at.activation_bytes
    width = at.images * (tokens + text) // at.mesh["context"] * at.activation_bytes
    layer = (4 * d * d + 3 * d * hidden) * at.weight_bytes // at.mesh["tensor"]
    if at.platform == "cpu":  # cuts each layer from its stack
        return beside + max(layer + width * (7 * d + 2 * hidden), largest * layer + 6 * width * d)
    gathered = layer + layer // 2 if at.mesh["fsdp"] > 1 else 0
    scores = at.score_bytes(cfg.num_attention_heads, tokens + text)
    return beside + gathered + width * 2 * d + width * (3 * d + 2 * hidden) // at.mesh["tensor"] + scores


def encode_bytes(cfg: DecoderConfig, layers: tuple[int, ...], at: Footprint, text: int) -> int:
    """Scores in float32, twice, the states that are kept, twice, and what a block works on; on a CPU also the
    layer that it cuts from its stack."""
    d, inner, shared, hidden = (
        cfg.hidden_size,
        cfg.num_attention_heads * cfg.head_dim,
        cfg.num_key_value_heads * cfg.head_dim,
        cfg.intermediate_size,
    )
    scores = 8 * at.images * cfg.num_attention_heads * text**2 // at.mesh["tensor"]
    states = 2 * at.images * text * len(layers) * d * at.activation_bytes
    width = at.images * text * at.activation_bytes * (3 * d + max(3 * inner, 2 * hidden) // at.mesh["tensor"])
    layer = (2 * d * inner + 2 * d * shared + 3 * d * hidden) * at.weight_bytes // at.mesh["tensor"]
    return scores + states + width + (layer if at.platform == "cpu" or at.mesh["fsdp"] > 1 else 0)
