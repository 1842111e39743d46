"""Writes FLUX pipelines of random weights in diffusers' layout, with flux-mini's tokenizers; by diffusers itself.

python jobs/bench/random_flux.py DIR middle      # 0.3 G parameters, float32: for a CPU
python jobs/bench/random_flux.py DIR dev         # FLUX.1's sizes, 12 G + T5-XXL, bfloat16: 34 GB, made on the GPU
"""

from __future__ import annotations

import pathlib
import shutil
import sys

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

MINI = pathlib.Path(__file__).parents[2] / "fluxbatch/checkpoints/flux-mini"
SIZES = {  # double, single, heads; T5's blocks, width and hidden width; VAE's channels; guidance
    "tiny": (1, 1, 1, 1, 64, 128, (32, 32, 32, 32), False),  # to try the bench
    "middle": (4, 8, 9, 2, 512, 1024, (64, 128, 256, 256), False),
    "dev": (19, 38, 24, 24, 4096, 10240, (128, 256, 512, 512), True),
}


def write(folder: pathlib.Path, name: str) -> int:
    """The pipeline called ``name``; returns the transformer's parameters."""
    double, single, heads, blocks, width, hidden, channels, guidance = SIZES[name]
    full = name == "dev"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if full else torch.float32)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        flux = FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            joint_attention_dim=width,
            pooled_projection_dim=768,
            guidance_embeds=guidance,
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=channels,
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=32128,
                d_model=width,
                d_kv=64,
                d_ff=hidden,
                num_layers=blocks,
                num_heads=width // 64,
                feed_forward_proj="gated-gelu",
            )
        )
    for part, module in {"transformer": flux, "vae": vae, "text_encoder": clip, "text_encoder_2": t5}.items():
        module.save_pretrained(folder / part)
    FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance).save_pretrained(
        folder / "scheduler"
    )
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(MINI / part, folder / part, dirs_exist_ok=True)
    shutil.copy(MINI / "model_index.json", folder)
    return sum(p.numel() for p in flux.parameters())


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in SIZES:
        sys.exit(__doc__)
    print(f"{write(pathlib.Path(sys.argv[1]), sys.argv[2]):,} parameters in the transformer")
