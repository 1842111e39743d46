"""Small random Z-Image pipelines, made and run by diffusers: the golden that tests compare with, and those of the parity
tests.

    python tests/golden/generate_zimage.py            # rewrites zimage* beside this file

Needs ``pip install .[parity]``; the tests that read the goldens do not.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from generate_flux2 import loud, tokenizer  # noqa: E402

AROUND = 50  # tokens of the template around a prompt, for a tokenizer of bytes
GOLDEN = dict(seed=10, heads=2, axes=(4, 2, 2), layers=2, refiners=1, channels=4, width=8, sizes=(4, 8, 8))


def pipeline(heads, axes, layers, refiners, channels, seed=0, width=16, sizes=(8, 16, 16), shift=3.0, dynamic=False,
             text_layers=3, **options) -> ZImagePipeline:  # fmt: skip
    """A pipeline with random weights."""
    g = torch.Generator().manual_seed(seed)
    words = tokenizer("klein")
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=text_layers,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    pictures = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(sizes), up_block_types=["UpDecoderBlock2D"] * len(sizes),
        block_out_channels=sizes, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        scaling_factor=0.36, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        in_channels=channels, dim=heads * sum(axes), n_layers=layers, n_refiner_layers=refiners, n_heads=heads,
        n_kv_heads=heads, cap_feat_dim=width, axes_dims=list(axes), **options,
    )  # fmt: skip
    with torch.no_grad():  # else few words of a prompt among much padding go unheard
        loud(transformer, 0.2, g).cap_embedder[1].weight.mul_(3)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic),
        vae=loud(pictures, 0.15, g), text_encoder=loud(text, 0.25, g), tokenizer=words, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def render(pipe: ZImagePipeline, row: dict) -> np.ndarray:
    """The picture diffusers makes of a row: uint8 ``[H, W, 3]``."""
    given = {key: row[key] for key in ("height", "width", "num_inference_steps", "guidance_scale")}
    image = pipe(
        **given, prompt=row["prompt"], negative_prompt=row.get("negative_prompt"),
        max_sequence_length=row.get("max_sequence_length", 512),
        generator=torch.Generator("cpu").manual_seed(row["seed"]),
    ).images[0]  # fmt: skip
    return np.asarray(image)


def prompt_of(tokens: int) -> str:
    """One that has so many tokens with its template."""
    return ("a red fox on a blue hill under stars, " * 20)[: tokens - AROUND]


def rows() -> list[dict]:
    """Prompts of two, of three and of five windows, with and without guidance, of images with padding and without."""
    each = [
        dict(prompt=prompt_of(64), num_inference_steps=3, height=64, width=64),
        dict(prompt=prompt_of(65), num_inference_steps=4, height=32, width=48, guidance_scale=4.0),
        dict(prompt=prompt_of(150), num_inference_steps=9, height=32, width=32, guidance_scale=0.5,
             negative_prompt="hens in the snow"),
        dict(prompt="x", num_inference_steps=2, height=64, width=48, negative_prompt="not read"),
    ]  # fmt: skip
    return [dict(id=f"g{i}", seed=100 + i, guidance_scale=0.0) | row for i, row in enumerate(each)]


def main() -> None:
    (HERE / "zimage.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    pipe = pipeline(**GOLDEN)
    pipe.transformer.half()  # what embeds time is a megabyte, whatever the model's size
    pipe.save_pretrained(HERE / "zimage")
    pipe.transformer.float()
    np.savez_compressed(HERE / "zimage.npz", **{row["id"]: render(pipe, row) for row in rows()})


if __name__ == "__main__":
    main()
