"""Names of Chroma's weights in checkpoints, those of FLUX.1's blocks and the approximator's, and the sizes that shapes
give away. FLUX.1's rules for what Chroma has not lead nowhere, so that a tensor of such a name is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxbatch.models.flux1 import keys
from fluxbatch.models.flux1.single_files import transformer_sizes as flux1_sizes
from fluxbatch.models.key_tables import Rule, Table, linear

Shapes = Mapping[str, tuple[int, ...]]


def _approximator(in_layer: str, out_layer: str, scale: str) -> tuple[Rule, ...]:
    src, dst = r"distilled_guidance_layer\.", "approximator."
    return (
        *(rule for name in ("in_proj", "out_proj") for rule in linear(src + name, dst + name)),
        *linear(src + rf"layers\.(\d+)\.{in_layer}", dst + "layer{0}.in_layer"),
        *linear(src + rf"layers\.(\d+)\.{out_layer}", dst + "layer{0}.out_layer"),
        Rule(src + rf"norms\.(\d+)\.{scale}", dst + "layer{0}.norm.scale"),
    )


TRANSFORMER_DIFFUSERS = Table((*keys.FLUX_DIFFUSERS.rules, *_approximator("linear_1", "linear_2", "weight")))
TRANSFORMER_ORIGINAL = Table((*keys.FLUX_BFL.rules, *_approximator("in_layer", "out_layer", "(?:scale|weight)")))


def transformer_sizes(shapes: Shapes, layers: Mapping[str, int]) -> dict[str, Any]:
    """The entries of ``transformer/config.json`` that a single file's shapes give away. ``layers``: of each stack."""
    hidden, channels = shapes["approximator.in_proj.kernel"]
    found = flux1_sizes({**shapes, "vector_in.in_layer.kernel": (0, 0)}, layers)
    return found | dict(
        approximator_num_channels=channels,
        approximator_hidden_dim=hidden,
        approximator_layers=sum(path.startswith("approximator.") and path.endswith(".norm.scale") for path in shapes),
    )
