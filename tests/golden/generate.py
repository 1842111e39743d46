"""Small random FLUX pipelines, made and run by diffusers: the goldens that tests compare with.

    python tests/golden/generate.py            # rewrites the files beside this one

Needs ``pip install .[parity]``; the tests that read the goldens do not.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

HERE = pathlib.Path(__file__).parent

PROMPTS = [
    "a red apple on a blue background",
    "three origami foxes, studio light",
    "eine Straße in São Paulo — 東京 at night",
    "a very long prompt " * 12,
]

VARIANTS = {
    # guidance, time shift, non-square patches of text and image
    "dev": dict(
        heads=2,
        head_dim=16,
        axes=(4, 6, 6),
        layers=2,
        single=2,
        channels=4,
        guidance=True,
        dynamic=True,
        act="quick_gelu",
    ),
    "schnell": dict(
        heads=3, head_dim=8, axes=(2, 2, 4), layers=1, single=3, channels=8, guidance=False, dynamic=False, act="gelu"
    ),
}


def tokenizers(length: int) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Character-level tokenizers of the two kinds, without any downloaded vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    chars = list(bytes_to_unicode().values())
    pieces = [*chars, *(c + "</w>" for c in chars), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=length)
    letters = [chr(i) for i in range(33, 127)]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in letters)]
    t5 = T5TokenizerFast(vocab=scores, extra_ids=0)
    return clip, t5


def loud(module: torch.nn.Module, std: float, generator: torch.Generator) -> torch.nn.Module:
    """Random weights that listen: at their usual size another prompt would hardly move the image."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1 and "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=generator))
            else:
                p.copy_(std * torch.randn(p.shape, generator=generator))
    return module.eval()


def pipeline(
    heads,
    head_dim,
    axes,
    layers,
    single,
    channels,
    guidance,
    dynamic,
    act,
    seed=0,
    width=32,
    clip_length=24,
    vae=(8, 16, 16),
) -> FluxPipeline:
    g = torch.Generator().manual_seed(seed)
    clip_tokenizer, t5_tokenizer = tokenizers(clip_length)
    flux = FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=layers,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        guidance_embeds=guidance,
        axes_dims_rope=axes,
    )
    decoder = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(vae),
        up_block_types=["UpDecoderBlock2D"] * len(vae),
        block_out_channels=vae,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=0.36,
        shift_factor=0.11,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=clip_length,
            hidden_act=act,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=2 if act == "quick_gelu" else clip_tokenizer.eos_token_id,
            pad_token_id=1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic)
    return FluxPipeline(
        scheduler=scheduler, vae=loud(decoder, 0.12, g), text_encoder=loud(clip, 0.3, g), tokenizer=clip_tokenizer,
        text_encoder_2=loud(t5, 0.3, g), tokenizer_2=t5_tokenizer, transformer=loud(flux, 0.2, g))  # fmt: skip


def rows(dynamic: bool) -> list[dict]:
    """Mixed sizes, steps and guidance; prompts of several lengths and scripts."""
    sizes = [(32, 32), (32, 48), (64, 32), (32, 32)]
    return [
        {"id": f"g{i}", "prompt": prompt, "seed": 100 + i, "height": h, "width": w, "num_inference_steps": 2 + i,
         "guidance_scale": 1.0 + i, **({"prompt_2": "another reading"} if i == 1 else {})}
        for i, (prompt, (h, w)) in enumerate(zip(PROMPTS, sizes, strict=True))
    ]  # fmt: skip


def render(pipe: FluxPipeline, row: dict, length: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The picture diffusers makes of a row: uint8 ``[H, W, 3]``."""
    image = pipe(
        prompt=row["prompt"],
        prompt_2=row.get("prompt_2"),
        height=row["height"],
        width=row["width"],
        num_inference_steps=row["num_inference_steps"],
        guidance_scale=row["guidance_scale"],
        max_sequence_length=length,
        generator=torch.Generator("cpu").manual_seed(row["seed"]),
        output_type="pil",
    )
    return np.asarray(image.images[0])


def main(names: list[str]) -> None:
    for name in names or VARIANTS:
        pipe = pipeline(**VARIANTS[name])
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(HERE / name)
        todo = rows(VARIANTS[name]["dynamic"])
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in todo))
        np.savez_compressed(HERE / f"{name}.npz", **{row["id"]: render(pipe, row, 24) for row in todo})


if __name__ == "__main__":
    main(sys.argv[1:])
