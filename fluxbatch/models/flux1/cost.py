"""Floating-point operations of the four networks: two for each multiply-add of a matrix product or convolution.

All figures are for one image. What is linear in the tokens (norms, activations, modulation) is less than 0.1 % and
not counted. FLUX.1 dev at 1024 × 1024 with 512 text tokens: 74.4 T a step, and 8.9 T for the picture. What is asked for
each row of a manifest is kept: its sizes are few.
"""

from __future__ import annotations

import functools

from fluxbatch.models.autoencoder import VaeConfig
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


@functools.cache
def vae_decode(cfg: VaeConfig, height: int, width: int) -> int:
    """Latents to a picture of ``height`` × ``width`` pixels."""
    pixels = (height // cfg.scale) * (width // cfg.scale)
    sizes, c = cfg.block_out_channels[::-1], cfg.latent_channels
    deepest = sizes[0]
    total = _conv(c, deepest, 3) + 2 * _resnet(deepest, deepest) + (_conv(c, c, 1) if cfg.use_post_quant_conv else 0)
    if cfg.mid_block_add_attention:
        total += 2 * (4 * deepest * deepest + 2 * pixels * deepest)
    total *= pixels
    before = deepest
    for i, size in enumerate(sizes):
        total += pixels * (_resnet(before, size) + cfg.layers_per_block * _resnet(size, size))
        if i + 1 < len(sizes):
            pixels *= 4
            total += pixels * _conv(size, size, 2)  # 3×3 over doubled pixels sees 2×2 of them: Conv.of_doubled
        before = size
    return total + pixels * _conv(before, 3, 3)


def _conv(c_in: int, c_out: int, size: int) -> int:
    """Of one pixel."""
    return 2 * size * size * c_in * c_out


def _resnet(c_in: int, c_out: int) -> int:
    return _conv(c_in, c_out, 3) + _conv(c_out, c_out, 3) + (_conv(c_in, c_out, 1) if c_in != c_out else 0)
