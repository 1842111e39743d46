"""Small random FLUX.3 pipelines, made and run by diffusers' modular pipelines: the golden that tests compare with, and
those of the parity tests.

    python tests/golden/generate_flux3.py            # rewrites flux3-* beside this file

Needs ``pip install .[parity]``; the tests that read the goldens do not.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux3Transformer2DModel
from diffusers.modular_pipelines import Flux3AutoBlocks, Flux3DistilledAutoBlocks
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
import generate_flux2  # noqa: E402
from generate_flux2 import loud, picture  # noqa: E402

AROUND = 50  # tokens of the template around a prompt, for a tokenizer of bytes
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GOLDEN = dict(seed=10, heads=2, axes=(2, 2, 2, 2), layers=1, joint=2, channels=2, width=8, sizes=(4, 4, 8, 8))


class Processor:
    """What the pipeline needs of Qwen3VLProcessor, which cannot be made without torchvision."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        self.tokenizer = tokenizer
        self.apply_chat_template = tokenizer.apply_chat_template


def tokenizer() -> Qwen2Tokenizer:
    """One token a byte, without any downloaded vocabulary."""
    made = generate_flux2.tokenizer("klein")
    made.model_max_length = 8192
    made.chat_template = TEMPLATE
    return made


def encoder(vocabulary: int, width: int) -> Qwen3VLForConditionalGeneration:
    speaks = dict(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=33,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1],
                         "mrope_interleaved": True},
    )  # fmt: skip
    sees = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=width, num_position_embeddings=4,
        deepstack_visual_indexes=[0],
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=speaks, vision_config=sees))


def pipeline(flow_map: bool, heads, axes, layers, joint, channels, seed=0, width=16, sizes=(8, 8, 16, 16), **options):
    """A pipeline with random weights, without the prompt upsampler."""
    g = torch.Generator().manual_seed(seed)
    words = tokenizer()
    text = loud(encoder(len(words), width), 0.25, g)
    pictures: AutoencoderKLFlux2 = loud(generate_flux2.autoencoder(channels, sizes), 0.15, g)
    flux = Flux3Transformer2DModel(
        in_channels=4 * channels, cond_in_channels=4 * channels, num_layers=layers, num_single_layers=joint,
        attention_head_dim=sum(axes), num_attention_heads=heads, joint_attention_dim=8 * width, axes_dims_rope=axes,
        flow_map=flow_map, **options,
    )  # fmt: skip
    # else few words of a prompt among much padding go unheard
    louder = {"norm_[qk]": 3, "context_embedder": 3, "to_out": 2, "proj_out": 2}
    with torch.no_grad():
        pictures.decoder.conv_out.weight.mul_(0.5)  # colours, not black and white, in which errors would hide
        for name, p in loud(flux, 0.2, g).named_parameters():
            for pattern, factor in louder.items():
                if re.search(pattern, name):
                    p.mul_(factor)
    blocks = Flux3DistilledAutoBlocks() if flow_map else Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=flux,
        vae=pictures,
        text_encoder=text,
        tokenizer=Processor(words),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe, folder: pathlib.Path, parts=("transformer", "vae", "text_encoder", "tokenizer")) -> None:
    """As ``save_pretrained``, which cannot save what stands in for the processor."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in parts:
        part = pipe.tokenizer.tokenizer if name == "tokenizer" else getattr(pipe, name)
        part.save_pretrained(folder / name)
    (folder / "modular_model_index.json").write_text(json.dumps({"_class_name": type(pipe).__name__}) + "\n")


def render(pipe, row: dict, images: list[Image.Image] | None = None) -> np.ndarray:
    """The picture diffusers makes of a row: uint8 ``[H, W, 3]``."""
    given = dict(
        prompt=row["prompt"], num_inference_steps=row["num_inference_steps"],
        max_sequence_length=row.get("max_sequence_length", 8192),
        generator=torch.Generator("cpu").manual_seed(row["seed"]),
    )  # fmt: skip
    given |= {key: row[key] for key in ("height", "width") if key in row}
    if images:
        given["image"] = images if len(images) > 1 else images[0]
    if not pipe.transformer.config.flow_map:
        given["negative_prompt"] = row.get("negative_prompt", "")
        pipe.guider.guidance_scale = row["guidance_scale"]
    return np.asarray(pipe(**given, output="images")[0])


def prompt_of(tokens: int) -> str:
    """One that has so many tokens with its template."""
    return ("a red fox on a blue hill under stars, " * 40)[: tokens - AROUND]


def rows() -> list[dict]:
    """Prompts of one, of two and of three windows, and one picture that stands on a canvas larger than it."""
    each = [
        dict(prompt=prompt_of(79), num_inference_steps=3, height=32, width=32),
        dict(prompt=prompt_of(81), num_inference_steps=4, height=32, width=48, negative_prompt=prompt_of(100)),
        dict(prompt=prompt_of(200), num_inference_steps=9, height=32, width=32),
        dict(prompt="in snow", num_inference_steps=2, image="flux3.png"),
    ]
    return [dict(id=f"g{i}", seed=100 + i, guidance_scale=(4.0, 6.0)[i % 2]) | row for i, row in enumerate(each)]


def main() -> None:
    (HERE / "flux3.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    reference = picture(40, 23, 1)
    reference.save(HERE / "flux3.png")
    for name in ("base", "klein"):
        pipe = pipeline(name == "klein", **GOLDEN)
        save(pipe, HERE / f"flux3-{name}", *([("transformer",)] if name == "klein" else []))
        drawn = {row["id"]: render(pipe, row, [reference] if "image" in row else None) for row in rows()}
        np.savez_compressed(HERE / f"flux3-{name}.npz", **drawn)


if __name__ == "__main__":
    main()
