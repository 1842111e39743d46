"""What the keys of FLUX.1's adapter files begin with, and how their trainers name its modules."""

from __future__ import annotations

from fluxbatch.models.family import LoraKeys
from fluxbatch.models.flux1 import keys
from fluxbatch.models.key_tables import Rule

# (prefix, component, what writes it); the first that leads to a module of the component holds
PREFIXES = (
    ("base_model.model.transformer.", "transformer", "PEFT"),
    ("base_model.model.", "transformer", "PEFT"),
    ("transformer.", "transformer", "diffusers"),
    ("model.diffusion_model.", "transformer", "ComfyUI"),
    ("diffusion_model.", "transformer", "ComfyUI"),
    ("unet.", "transformer", "diffusers"),
    ("lora_unet_", "transformer", "kohya"),
    ("lora_transformer_", "transformer", "OneTrainer"),
    ("lycoris_", "transformer", "LyCORIS"),
    ("text_encoder.", "text_encoder", "diffusers"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "ComfyUI"),
    ("lora_te1_", "text_encoder", "kohya"),
    ("lora_te_", "text_encoder", "kohya"),
    ("clip_l.", "text_encoder", "OneTrainer"),
    ("text_encoder_2.", "text_encoder_2", "diffusers"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2", "ComfyUI"),
    ("lora_te3_", "text_encoder_2", "kohya"),
    ("lora_te2_", "text_encoder_2", "OneTrainer"),
    ("t5.", "text_encoder_2", "OneTrainer"),
    ("", "transformer", "bare"),
)

_DOUBLE, _SINGLE = r"double_blocks\.(\d+)\.", r"single_blocks\.(\d+)\."


def _thirds(pattern: str, target: str) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, f"{target}.{n}.kernel", ((i, i + 1, 3),)) for i, n in enumerate("qkv"))


XLABS = (
    *(r for i, s in (("1", "img"), ("2", "txt")) for r in _thirds(_DOUBLE + rf"processor\.qkv_lora{i}", f"double_blocks[{{0}}].{s}.qkv")),
    *(Rule(_DOUBLE + rf"processor\.proj_lora{i}", f"double_blocks[{{0}}].{s}.proj.kernel") for i, s in (("1", "img"), ("2", "txt"))),
    *_thirds(_SINGLE + r"processor\.qkv_lora", "single_blocks[{0}].qkv"),
    Rule(_SINGLE + r"processor\.proj_lora", "single_blocks[{0}].out.kernel"),
)
# OneTrainer's newer files: BFL's names, the fused layers apart
APART = (
    *(Rule(_DOUBLE + rf"{s}_attn\.qkv\.{i}", f"double_blocks[{{0}}].{s}.qkv.{n}.kernel") for s in ("img", "txt") for i, n in enumerate("qkv")),
    *(Rule(_SINGLE + rf"linear1\.{i}", f"single_blocks[{{0}}].{n}.kernel") for i, n in enumerate(("qkv.q", "qkv.k", "qkv.v", "mlp_in"))),
)

LORA = LoraKeys(
    PREFIXES,
    {
        "transformer": {"diffusers": keys.FLUX_DIFFUSERS.rules, "BFL": keys.FLUX_BFL.rules, "XLabs": XLABS, "BFL apart": APART},
        "text_encoder": {"transformers": keys.CLIP.rules},
        "text_encoder_2": {"transformers": keys.T5.rules},
    },
    # parts of CLIP that FLUX never reads: an adapter of them does nothing
    unread={"text_encoder": r"(?:text_model[._])?(?:text_projection|visual_projection|logit_scale)"},
    split_stacks=("double_blocks",),
)
