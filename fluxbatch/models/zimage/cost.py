"""What Z-Image's transformer costs, for one image: two floating-point operations for each multiply-add of a product."""

from __future__ import annotations

import functools

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
