"""Small random Chroma pipelines, made and run by diffusers: the golden that tests compare with, and those of the parity
tests.

    python tests/golden/generate_chroma.py            # rewrites chroma* beside this file

Needs ``pip install .[parity]``; the tests that read the goldens do not.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from generate import loud, tokenizers  # noqa: E402

APPROXIMATOR = "approximator_num_channels", "approximator_hidden_dim", "approximator_layers"
LENGTH = 48  # tokens of a prompt that are read
GOLDEN = dict(seed=10, heads=2, head_dim=8, axes=(2, 2, 4), layers=1, single=2, channels=4, width=16, sizes=(4, 8, 8))


def pipeline(heads, head_dim, axes, layers, single, channels, seed=0, width=32, sizes=(8, 16, 16), shift=1.0,
             dynamic=False, approximator=(16, 24, 2)) -> ChromaPipeline:  # fmt: skip
    """A pipeline with random weights. ``approximator``: its channels, hidden units and layers."""
    g = torch.Generator().manual_seed(seed)
    words = tokenizers(24)[1]
    transformer = ChromaTransformer2DModel(
        in_channels=4 * channels, num_layers=layers, num_single_layers=single, attention_head_dim=head_dim,
        num_attention_heads=heads, joint_attention_dim=width, axes_dims_rope=axes,
        **dict(zip(APPROXIMATOR, approximator, strict=True)),
    )  # fmt: skip
    pictures = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(sizes), up_block_types=["UpDecoderBlock2D"] * len(sizes),
        block_out_channels=sizes, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        scaling_factor=0.36, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(words), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    with torch.no_grad():  # else few words of a prompt among much padding go unheard
        loud(transformer, 0.2, g).context_embedder.weight.mul_(3)
    pipe = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic),
        vae=loud(pictures, 0.12, g), text_encoder=loud(t5, 0.3, g), tokenizer=words,
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def render(pipe: ChromaPipeline, row: dict, **more) -> np.ndarray:
    """The picture diffusers makes of a row: uint8 ``[H, W, 3]``."""
    given = {key: row[key] for key in ("height", "width", "num_inference_steps", "guidance_scale", "prompt")}
    image = pipe(
        **given, **more, negative_prompt=row.get("negative_prompt"), max_sequence_length=LENGTH,
        generator=torch.Generator("cpu").manual_seed(row["seed"]),
    ).images[0]  # fmt: skip
    return np.asarray(image)


def prompt_of(tokens: int) -> str:
    """One that has so many tokens, with those for its start and its end."""
    return ("a red fox on a blue hill under stars " * 20)[: tokens - 2].rstrip().ljust(tokens - 2, "x")


def rows() -> list[dict]:
    """Prompts that leave no padding, one token of it, and much; with and without guidance."""
    each = [
        dict(prompt=prompt_of(20), num_inference_steps=3, height=32, width=32),
        dict(prompt=prompt_of(47), num_inference_steps=4, height=32, width=48, guidance_scale=5.0),
        dict(prompt=prompt_of(48), num_inference_steps=9, height=64, width=32, guidance_scale=1.5,
             negative_prompt="hens in the snow"),
        dict(prompt=prompt_of(90), num_inference_steps=2, height=32, width=32, negative_prompt="not read"),
    ]  # fmt: skip
    return [dict(id=f"g{i}", seed=100 + i, guidance_scale=1.0) | row for i, row in enumerate(each)]


def main() -> None:
    (HERE / "chroma.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    pipe = pipeline(**GOLDEN)
    pipe.save_pretrained(HERE / "chroma")
    np.savez_compressed(HERE / "chroma.npz", **{row["id"]: render(pipe, row) for row in rows()})


if __name__ == "__main__":
    main()
