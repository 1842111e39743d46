"""What FLUX.1 costs: floating-point operations, two for each multiply-add, and bytes of activations.

All figures are for one image. What is linear in the tokens (norms, activations, modulation) is less than 0.1 % and
not counted. FLUX.1 dev at 1024 × 1024 with 512 text tokens: 74.4 T a step, and 8.9 T for the picture. What is asked for
each row of a manifest is cached: its sizes are few. Bytes are estimates of what the compiler keeps alive at the widest
point of each program; tests hold them against the compiler's own figures.
"""

from __future__ import annotations

import functools

from fluxbatch.models.family import Footprint
from fluxbatch.models.flux1.clip import ClipConfig
from fluxbatch.models.flux1.t5 import T5Config
from fluxbatch.models.flux1.transformer import FluxConfig


def flux_linear(cfg: FluxConfig, image: int, text: int) -> int:
    """A step's linear layers for ``image`` + ``text`` tokens."""
    d, blocks = cfg.width, cfg.num_layers + cfg.num_single_layers
    ends = image * d * (cfg.in_channels + cfg.out_channels) + text * cfg.joint_attention_dim * d
    return 2 * (blocks * 12 * d * d * (image + text) + ends)  # 12: q, k, v, out, and 4 + 4 of the MLP


def flux_attention(cfg: FluxConfig, image: int, text: int) -> int:
    """A step's scores and weighted sums."""
    return 4 * (cfg.num_layers + cfg.num_single_layers) * cfg.width * (image + text) ** 2


@functools.cache
def flux_step(cfg: FluxConfig, image: int, text: int) -> int:
    """One evaluation of the transformer."""
    return flux_linear(cfg, image, text) + flux_attention(cfg, image, text)


def t5(cfg: T5Config, tokens: int) -> int:
    """Encoding a prompt of ``tokens`` tokens, padding included."""
    inner = cfg.num_heads * cfg.d_kv
    return 2 * cfg.num_layers * tokens * (4 * cfg.d_model * inner + 3 * cfg.d_model * cfg.d_ff + 2 * tokens * inner)


def clip(cfg: ClipConfig, tokens: int) -> int:
    """Encoding a prompt of ``tokens`` tokens, padding included."""
    d = cfg.hidden_size
    return 2 * cfg.num_hidden_layers * tokens * (4 * d * d + 2 * d * cfg.intermediate_size + 2 * tokens * d)


def denoise_bytes(cfg: FluxConfig, at: Footprint, tokens: int, text: int) -> int:
    """The modulation of some steps, for each prompt, and in a single block: the sequence and its normed form, and in
    heads and hidden units q, k, v and the MLP's four widths; what else there is differs from compiler to compiler.
    ``tokens``, ``text``: of an image."""
    d = cfg.width
    vectors = 12 * cfg.num_layers + 3 * cfg.num_single_layers + 2
    modulation = at.passes * at.images * at.steps * vectors * d * at.activation_bytes
    width = at.images * (tokens + text) // at.mesh["context"] * d * at.activation_bytes
    layer = 12 * d * d * at.weight_bytes // at.mesh["tensor"]  # of a single block; a double one has twice that
    if at.platform == "cpu":  # cuts each layer from its stack
        return modulation + max(layer + 13 * width, 2 * layer + 6 * width)
    gathered = layer + layer // 2 if at.mesh["fsdp"] > 1 else 0  # three quarters of a double block: its MLPs come ahead
    scores = at.score_bytes(cfg.num_attention_heads, tokens + text)
    return modulation + gathered + 2 * width + 6 * width // at.mesh["tensor"] + scores


def t5_bytes(cfg: T5Config, at: Footprint, text: int, masked: bool = False) -> int:
    """Scores in float32, twice, the bias, of each row if there is a mask, and what a block works on; on a CPU also the
    layer that it cuts from its stack."""
    scores, biases = 4 * cfg.num_heads * text**2, at.images if masked else 1
    layer = cfg.d_model * (4 * cfg.num_heads * cfg.d_kv + 3 * cfg.d_ff)
    return (
        scores * (biases + 2 * at.images) + 4 * at.images * text * cfg.d_model * at.activation_bytes + _cut(at) * layer
    )


def clip_bytes(cfg: ClipConfig, at: Footprint) -> int:
    """The same without a bias, all in float32."""
    d, length = cfg.hidden_size, cfg.max_position_embeddings
    layer = d * (4 * d + 2 * cfg.intermediate_size)
    return 4 * at.images * length * (cfg.num_attention_heads * length + 4 * d) + _cut(at) * layer


def _cut(at: Footprint) -> int:
    """Bytes of a number of a layer that is cut from its stack."""
    return at.weight_bytes if at.platform == "cpu" else 0
