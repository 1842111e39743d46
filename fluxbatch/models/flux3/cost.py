"""What FLUX.3's transformer costs, for one image: two floating-point operations for each multiply-add of a product."""

from __future__ import annotations

import functools

from fluxbatch.models.flux3.transformer import Flux3Config


@functools.cache
def step(cfg: Flux3Config, image: int, text: int, references: int = 0) -> int:
    """One evaluation for so many tokens; with a negative prompt there are two a step. Early blocks of text and
    references are counted where each step has them, which is in a flow map."""
    d = cfg.width
    early = (image, text, references) if cfg.flow_map else (image,)
    passes = [(cfg.num_layers, tokens) for tokens in early] + [(cfg.num_single_layers, image + text + references)]
    layer = 4 * d * d + 3 * d * cfg.hidden  # q, k, v, out; gate, up and down
    ends = 2 * image * d * cfg.in_channels + references * d * cfg.cond_in_channels + text * cfg.joint_attention_dim * d
    return 2 * ends + sum(blocks * (2 * layer * tokens + 4 * d * tokens**2) for blocks, tokens in passes)


def modulation(cfg: Flux3Config) -> int:
    """Of a step, in widths: early and joint ones of the image, or of all groups, and the last one."""
    return (18 if cfg.flow_map else 6) + 2
