"""What AutoencoderKL's decoder costs: floating-point operations, and bytes of activations."""

from __future__ import annotations

import functools

from fluxbatch.models.autoencoder import VaeConfig
from fluxbatch.models.family import Footprint


@functools.cache
def decode_flops(cfg: VaeConfig, height: int, width: int) -> int:
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


def decode_bytes(cfg: VaeConfig, at: Footprint) -> int:
    """The widest resnet in float32, in which pictures that bfloat16 cannot hold are decoded again, of the pictures that
    are decoded at once: its input, once as it is and once as the convolution that doubled the pixels left it, the
    normed form and the outputs of its convolutions. Of TPUs and GPUs the factor lies between libtpu's figures for
    FLUX.1 on one v6e, 6 % more at 1024 × 1024, and XLA:GPU's and those of meshes of four TPUs, 5 % less. What cuDNN
    takes to work in is not known before."""
    widest, pixels = 0.0, at.height * at.width
    sizes = cfg.block_out_channels
    for size, before in zip(sizes, (*sizes[1:], sizes[-1]), strict=True):
        widest = max(widest, pixels * (2.13 * before if at.platform != "cpu" else max(3 * before, before + 3 * size)))
        pixels //= 4
    return int(4 * at.at_once * widest) + 3 * at.images * at.height * at.width
