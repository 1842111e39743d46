"""Small random FLUX.2 pipelines, made and run by diffusers: the golden that tests compare with, and those of the parity
tests.

    python tests/golden/generate_flux2.py            # rewrites flux2-* beside this file

Needs ``pip install .[parity]``; the tests that read the goldens do not.
"""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from transformers import (
    Mistral3Config,  # fmt: skip
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = pathlib.Path(__file__).parent
LENGTH = 96  # of prompts, template and padding included; dev's has a system message of 200

PROMPTS = [
    "a red apple on blue",
    "three origami foxes, studio light",
    "Straße in São Paulo — 東京",
    "a very long prompt " * 20,
]

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is "
    "false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{{ part['text'] }}{% "
    "endfor %}"
    "{% if m['role'] == 'user' %}[/INST]{% endif %}{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)

# Drawn with twice: as a distilled model, and as a base with guidance.
GOLDEN = dict(
    seed=6,
    kind="distilled",
    heads=2,
    axes=(2, 2, 2, 2),
    layers=1,
    single=2,
    channels=4,
    width=16,
    groups=1,
    text_heads=2,
    vae={"sizes": (4, 8, 8)},
)
VARIANTS = {
    "flux2-klein": dict(kind="distilled", heads=2, axes=(4, 4, 4, 4), layers=1, single=2, channels=4),
    "flux2-base": dict(kind="base", heads=3, axes=(2, 4, 6, 4), layers=2, single=1, channels=2, groups=1),
    "flux2-dev": dict(kind="dev", heads=2, axes=(4, 2, 2, 4), layers=1, single=1, channels=4, side="left"),
}


def tokenizer(kind: str, side: str = "right") -> Qwen2Tokenizer:
    """One token a byte, without any downloaded vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*bytes_to_unicode().values(), *special]
    made = Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=2048, padding_side=side
    )
    if kind == "dev":
        made.add_special_tokens({"bos_token": "<|im_start|>"})
    made.chat_template = MISTRAL_TEMPLATE if kind == "dev" else QWEN_TEMPLATE
    return made


def loud(module: torch.nn.Module, std: float, generator: torch.Generator) -> torch.nn.Module:
    """Random weights that listen: at their usual size another prompt would hardly move the image."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1 and "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=generator))
            else:
                p.copy_(std * torch.randn(p.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.5 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.3 + torch.rand(buffer.shape, generator=generator))
    return module.eval()


def autoencoder(channels: int, sizes=(8, 16, 16), **options) -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        **dict(
            down_block_types=["DownEncoderBlock2D"] * len(sizes),
            up_block_types=["UpDecoderBlock2D"] * len(sizes),
            block_out_channels=sizes,
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=4,
        )
        | options
    )


def encoder(
    kind: str, vocabulary: int, depth: int, width: int, heads: int, groups: int, head_dim: int
) -> torch.nn.Module:
    sizes = dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=4096,
    )
    if kind != "dev":
        return Qwen3ForCausalLM(
            Qwen3Config(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True)
        )
    sees = PixtralVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=32,
        patch_size=16,
        head_dim=8,
    )
    speaks = MistralConfig(
        **sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e9}, rms_norm_eps=1e-5, sliding_window=None
    )
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=speaks, vision_config=sees))


def pipeline(
    kind,
    heads,
    axes,
    layers,
    single,
    channels,
    seed=0,
    width=24,
    groups=2,
    text_heads=4,
    depth=None,
    side="right",
    dynamic=True,
    mlp_ratio=3.0,
    vae=None,
) -> Flux2Pipeline | Flux2KleinPipeline:
    g = torch.Generator().manual_seed(seed)
    words = tokenizer(kind, side)
    text = encoder(kind, len(words), depth or (32 if kind == "dev" else 29), width, text_heads, groups, 8)
    flux = Flux2Transformer2DModel(
        in_channels=4 * channels,
        num_layers=layers,
        num_single_layers=single,
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        joint_attention_dim=3 * width,
        guidance_embeds=kind == "dev",
        axes_dims_rope=axes,
        mlp_ratio=mlp_ratio,
    )
    pictures = loud(autoencoder(channels, **(vae or {})), 0.15, g)
    with torch.no_grad():  # colours, not black and white, in which errors would hide
        pictures.decoder.conv_out.weight.mul_(0.5)
        for name, p in loud(flux, 0.2, g).named_parameters():
            if re.search(
                "norm_(added_)?[qk]", name
            ):  # else few words of a prompt among many that are always there go unheard
                p.mul_(3)
    parts = dict(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic), vae=pictures,
        text_encoder=loud(text, 0.25, g), tokenizer=words, transformer=flux)  # fmt: skip
    pipe = Flux2Pipeline(**parts) if kind == "dev" else Flux2KleinPipeline(**parts, is_distilled=kind == "distilled")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(width: int, height: int, seed: int, mode: str = "RGB") -> Image.Image:
    """Of smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.clip(np.asarray(small).astype(int) + rng.integers(-20, 20, (height, width, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def rows() -> list[dict]:
    """Mixed sizes, steps and guidance; prompts of several lengths and scripts."""
    sizes = [(32, 32), (32, 48), (64, 32), (32, 32)]
    return [
        {
            "id": f"g{i}",
            "prompt": prompt,
            "seed": 100 + i,
            "height": h,
            "width": w,
            "num_inference_steps": 3 + i,
            "guidance_scale": 4.0 + i,
        }
        for i, (prompt, (h, w)) in enumerate(zip(PROMPTS, sizes, strict=True))
    ]


def render(pipe, row: dict, length: int, images: list[Image.Image] | None = None) -> np.ndarray:
    """The picture diffusers makes of a row: uint8 ``[H, W, 3]``."""
    made = pipe(
        prompt=row["prompt"],
        image=images,
        height=row.get("height"),
        width=row.get("width"),
        num_inference_steps=row["num_inference_steps"],
        guidance_scale=row["guidance_scale"],
        max_sequence_length=length,
        generator=torch.Generator("cpu").manual_seed(row["seed"]),
    )
    return np.asarray(made.images[0])


def length_of(name: str) -> int:
    return LENGTH + 200 if name.endswith("dev") else LENGTH


def main() -> None:
    pipe = pipeline(**GOLDEN)
    pipe.save_pretrained(HERE / "flux2-klein")
    (HERE / "flux2.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()))
    for name, distilled in (("klein", True), ("base", False)):
        pipe.register_to_config(is_distilled=distilled)
        np.savez_compressed(HERE / f"flux2-{name}.npz", **{row["id"]: render(pipe, row, LENGTH) for row in rows()})


if __name__ == "__main__":
    main()
