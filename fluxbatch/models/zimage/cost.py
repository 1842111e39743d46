"""What Z-Image's transformer costs: floating-point operations of one image, two for each multiply-add of a product, and
bytes of activations, an estimate of what the compiler keeps alive in a joint block."""

from __future__ import annotations

import functools

from fluxbatch.models.family import Footprint
from fluxbatch.models.zimage.transformer import ZImageConfig


@functools.cache
def step(cfg: ZImageConfig, image: int, text: int) -> int:
    """One evaluation for so many tokens, padding included; with guidance there are two a step. Blocks of text, which
    are the same in all steps, are not counted."""
    d = cfg.width
    layer = 4 * d * d + 3 * d * cfg.hidden  # q, k, v, out; gate, up and down
    passes = (cfg.n_refiner_layers, image), (cfg.n_layers, image + text)
    ends = 2 * image * d * 4 * cfg.in_channels
    return 2 * ends + sum(blocks * (2 * layer * tokens + 4 * d * tokens**2) for blocks, tokens in passes)


def denoise_bytes(cfg: ZImageConfig, at: Footprint, image: int, text: int) -> int:
    """As the MLP comes after attention, at the widest point there are tokens, their normed form, what attention has
    made, and the MLP's halves; besides what texts are embedded to."""
    d, hidden, numbers = cfg.width, cfg.hidden, at.activation_bytes
    beside = at.passes * at.images * (at.steps + text) * d * numbers
    tokens = at.images * (image + text) // at.mesh["context"]
    attention, mlp = (count * at.weight_bytes // at.mesh["tensor"] for count in (4 * d * d, 3 * d * hidden))
    if at.platform == "cpu":  # cuts each layer from its stack, and multiplies in float32
        return beside + attention + mlp + tokens * (2 * d * numbers + 2 * hidden * 4)
    gathered = mlp if at.mesh["fsdp"] > 1 else 0
    wide = tokens * numbers * (3 * d + max(3 * d, 2 * hidden) // at.mesh["tensor"])
    return beside + gathered + wide + at.score_bytes(cfg.num_attention_heads, image + text)
