"""What the keys of FLUX.2's adapter files begin with, and how their trainers name its modules.

Of the final layer's modulation files in BFL's names have shift before scale, those in diffusers' names scale before
shift, as the checkpoints whose names they use; the key tables tell them apart.
"""

from __future__ import annotations

import dataclasses

from fluxbatch.models.family import LoraKeys
from fluxbatch.models.flux2 import keys
from fluxbatch.models.key_tables import Rule

# (prefix, component, what writes it); the first that leads to a module of the component holds
PREFIXES = (
    ("base_model.model.transformer.", "transformer", "PEFT"),
    ("base_model.model.", "transformer", "PEFT"),
    ("transformer.", "transformer", "diffusers"),
    ("model.diffusion_model.", "transformer", "ComfyUI"),
    ("diffusion_model.", "transformer", "ComfyUI"),
    ("lora_unet_", "transformer", "kohya"),
    ("lora_transformer_", "transformer", "OneTrainer"),
    ("lycoris_", "transformer", "LyCORIS"),
)


def _thirds(pattern: str, target: str) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, f"{target}.{n}.kernel", ((i, i + 1, 3),)) for i, n in enumerate("qkv"))


# diffusers' names of a transformer whose projections were fused before it was trained
FUSED = (
    *_thirds(r"transformer_blocks\.(\d+)\.attn\.to_qkv", "double_blocks[{0}].img.qkv"),
    *_thirds(r"transformer_blocks\.(\d+)\.attn\.to_added_qkv", "double_blocks[{0}].txt.qkv"),
)
DIFFUSERS = (*keys.transformer_diffusers().rules, *FUSED)
# of some exports that took "tran" for a part of the prefix
CLIPPED = tuple(
    dataclasses.replace(rule, pattern=rule.pattern.removeprefix("tran"))
    for rule in DIFFUSERS
    if rule.pattern.startswith("transformer_blocks")
)

LORA = LoraKeys(
    PREFIXES,
    {"transformer": {"diffusers": (*DIFFUSERS, *CLIPPED), "BFL": keys.transformer_bfl().rules}},
    split_stacks=("double_blocks",),
)
