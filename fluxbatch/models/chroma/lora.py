"""What the keys of Chroma's adapter files begin with, and how their trainers name its modules: as FLUX.1's, whose
adapters fit as far as they change blocks."""

from __future__ import annotations

from fluxbatch.models.chroma import keys
from fluxbatch.models.family import LoraKeys
from fluxbatch.models.flux1 import lora
from fluxbatch.models.flux1.keys import T5

# T5 is the one text encoder, whatever number it has
PREFIXES = (
    *((prefix, of and of.removesuffix("_2"), writer) for prefix, of, writer in lora.PREFIXES if of != "text_encoder"),
    ("text_encoder.", "text_encoder", "diffusers"),
)
LORA = LoraKeys(
    PREFIXES,
    {
        "transformer": {
            "diffusers": keys.TRANSFORMER_DIFFUSERS.rules,
            "original": keys.TRANSFORMER_ORIGINAL.rules,
            "BFL apart": lora.APART,
        },
        "text_encoder": {"transformers": T5.rules},
    },
    split_stacks=("double_blocks",),
)
