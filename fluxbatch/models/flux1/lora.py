"""What the keys of FLUX.1's adapter files begin with, and how their trainers name its modules."""

from __future__ import annotations

from fluxbatch.models.family import LoraKeys
from fluxbatch.models.flux1 import keys
from fluxbatch.models.key_tables import SWAP_HALVES, Rule

# (prefix, component, what writes it), one after another as far as they stand there: of those that lead to a module of
# the component the first holds. None: it says nothing of the component.
PREFIXES: tuple[tuple[str, str | None, str], ...] = (
    ("base_model.model.", None, "PEFT"),
    ("base_model_model_", None, "PEFT"),
    ("transformer.", "transformer", "diffusers"),
    ("transformer_", "transformer", "diffusers"),
    ("model.diffusion_model.", "transformer", "ComfyUI"),
    ("diffusion_model.", "transformer", "ComfyUI"),
    ("model_diffusion_model_", "transformer", "ComfyUI"),
    ("diffusion_model_", "transformer", "ComfyUI"),
    ("unet.", "transformer", "diffusers"),
    ("pipe.dit.", "transformer", "DiffSynth"),
    ("dit.", "transformer", "DiffSynth"),
    ("lora_unet_", "transformer", "kohya"),
    ("lora_transformer_", "transformer", "OneTrainer"),
    ("lycoris_", "transformer", "LyCORIS"),
    ("text_encoder.", "text_encoder", "diffusers"),
    ("text_encoder_2.", "text_encoder_2", "diffusers"),
    ("text_encoder_2_", "text_encoder_2", "diffusers"),
    ("text_encoder_", "text_encoder", "diffusers"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "ComfyUI"),
    ("text_encoders.clip_l.", "text_encoder", "ComfyUI"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2", "ComfyUI"),
    ("text_encoders.t5xxl.", "text_encoder_2", "ComfyUI"),
    ("lora_te1_", "text_encoder", "kohya"),
    ("lora_te_", "text_encoder", "kohya"),
    ("clip_l.", "text_encoder", "OneTrainer"),
    ("lora_te3_", "text_encoder_2", "kohya"),
    ("lora_te2_", "text_encoder_2", "OneTrainer"),
    ("t5.", "text_encoder_2", "OneTrainer"),
    ("model.", None, ""),
)

_DOUBLE, _SINGLE = r"double_blocks\.(\d+)\.", r"single_blocks\.(\d+)\."


def _thirds(pattern: str, target: str) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, f"{target}.{n}.kernel", ((i, i + 1, 3),)) for i, n in enumerate("qkv"))


XLABS = (
    *(
        r
        for i, s in (("1", "img"), ("2", "txt"))
        for r in _thirds(_DOUBLE + rf"processor\.qkv_lora{i}", f"double_blocks[{{0}}].{s}.qkv")
    ),
    *(
        Rule(_DOUBLE + rf"processor\.proj_lora{i}", f"double_blocks[{{0}}].{s}.proj.kernel")
        for i, s in (("1", "img"), ("2", "txt"))
    ),
    *_thirds(_SINGLE + r"processor\.qkv_lora", "single_blocks[{0}].qkv"),
    Rule(_SINGLE + r"processor\.proj_lora", "single_blocks[{0}].out.kernel"),
)
# OneTrainer's newer files: BFL's names, the fused layers apart
APART = (
    *(
        Rule(_DOUBLE + rf"{s}_attn\.qkv\.{i}", f"double_blocks[{{0}}].{s}.qkv.{n}.kernel")
        for s in ("img", "txt")
        for i, n in enumerate("qkv")
    ),
    *(
        Rule(_SINGLE + rf"linear1\.{i}", f"single_blocks[{{0}}].{n}.kernel")
        for i, n in enumerate(("qkv.q", "qkv.k", "qkv.v", "mlp_in"))
    ),
)


def _diffsynth_stream(half: str, stream: str) -> tuple[Rule, ...]:
    src, dst = r"blocks\.(\d+)\.", f"double_blocks[{{0}}].{stream}."
    return (
        Rule(src + rf"norm1_{half}\.linear", dst + "mod.kernel"),
        *_thirds(src + rf"attn\.{half}_to_qkv", dst + "qkv"),
        *(Rule(src + rf"attn\.norm_{n[0]}_{half}", dst + f"qkv.{n}_norm.scale") for n in ("query", "key")),
        Rule(src + rf"attn\.{half}_to_out", dst + "proj.kernel"),
        Rule(src + rf"ff_{half}\.0", dst + "mlp_in.kernel"),
        Rule(src + rf"ff_{half}\.2", dst + "mlp_out.kernel"),
    )


# DiffSynth-Studio's own names; those of x_embedder and context_embedder are diffusers'
DIFFSYNTH = (
    *_diffsynth_stream("a", "img"),
    *_diffsynth_stream("b", "txt"),
    Rule(_SINGLE + r"norm\.linear", "single_blocks[{0}].mod.kernel"),
    *(Rule(_SINGLE + "to_qkv_mlp", f"single_blocks[{{0}}].qkv.{n}.kernel", ((i, i + 1, 7),))
      for i, n in enumerate("qkv")),
    Rule(_SINGLE + "to_qkv_mlp", "single_blocks[{0}].mlp_in.kernel", ((3, 7, 7),)),
    *(Rule(_SINGLE + f"norm_{n[0]}_a", f"single_blocks[{{0}}].qkv.{n}_norm.scale") for n in ("query", "key")),
    Rule(_SINGLE + "proj_out", "single_blocks[{0}].out.kernel"),
    *(Rule(rf"{src}\.{i}", f"{dst}.{layer}.kernel")
      for src, dst in ((r"time_embedder\.timestep_embedder", "time_in"), ("pooled_text_embedder", "vector_in"),
                       (r"guidance_embedder\.timestep_embedder", "guidance_in"))
      for i, layer in ((0, "in_layer"), (2, "out_layer"))),
    Rule(r"final_norm_out\.linear", "final_mod.kernel", SWAP_HALVES),
    Rule("final_proj_out", "final_out.kernel"),
)  # fmt: skip

LORA = LoraKeys(
    PREFIXES,
    {
        "transformer": {
            "diffusers": keys.FLUX_DIFFUSERS.rules,
            "BFL": keys.FLUX_BFL.rules,
            "XLabs": XLABS,
            "BFL apart": APART,
            "DiffSynth": DIFFSYNTH,
        },
        "text_encoder": {"transformers": keys.CLIP.rules},
        "text_encoder_2": {"transformers": keys.T5.rules},
    },
    # parts of CLIP that FLUX never reads: an adapter of them does nothing
    unread={"text_encoder": r"(?:text_model[._])?(?:text_projection|visual_projection|logit_scale)"},
    inputs=("img_in.kernel", "in_channels", "final_out.kernel"),
    split_stacks=("double_blocks",),
    writers=("XLabs", "DiffSynth"),
)
