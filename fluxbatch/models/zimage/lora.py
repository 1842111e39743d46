"""How trainers name Z-Image's modules in adapter files; the keys begin as those of FLUX.2's do."""

from __future__ import annotations

from fluxbatch.models.family import LoraKeys
from fluxbatch.models.flux2.lora import PREFIXES
from fluxbatch.models.zimage import keys

LORA = LoraKeys(
    PREFIXES,
    {"transformer": {"diffusers": keys.TRANSFORMER_DIFFUSERS.rules, "original": keys.TRANSFORMER_ORIGINAL.rules}},
)
