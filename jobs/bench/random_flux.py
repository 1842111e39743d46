"""Writes pipelines of random weights in diffusers' layout, by diffusers itself; FLUX.1's with flux-mini's tokenizers,
the others with one token a byte.

python jobs/bench/random_flux.py DIR middle      # 0.3 G parameters, float32: for a CPU
python jobs/bench/random_flux.py DIR dev         # FLUX.1's sizes, 12 G + T5-XXL, bfloat16: 34 GB, made on the GPU
python jobs/bench/random_flux.py DIR klein-4b    # FLUX.2 klein's, 4 G + Qwen3-4B: 16 GB
python jobs/bench/random_flux.py DIR flux2-dev   # 32 G + Mistral Small 3: 112 GB
python jobs/bench/random_flux.py DIR flux3-klein # FLUX.3 klein's, 6 G + Qwen3-VL-4B's language model: 19 GB
python jobs/bench/random_flux.py DIR z-image     # Z-Image-Turbo's, 6 G + Qwen3-4B: 21 GB
python jobs/bench/random_flux.py DIR chroma      # Chroma1-HD's, 9 G + T5-XXL: 28 GB
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import shutil
import sys
from types import ModuleType
from typing import Any

import torch
import yaml
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

ROOT = pathlib.Path(__file__).parents[2]
MINI = ROOT / "fluxbatch/checkpoints/flux-mini"
FLUX2 = {"klein-tiny": "FLUX.2-klein-4B", "klein-4b": "FLUX.2-klein-4B", "flux2-dev": "FLUX.2-dev"}  # sizes by file
FLUX3 = {"flux3-tiny": "flux-3-image-klein", "flux3-klein": "flux-3-image-klein"}
Z_IMAGE = {"z-image-tiny": "z-image-turbo", "z-image": "z-image-turbo"}
CHROMA = {"chroma-tiny": "Chroma1-HD", "chroma": "Chroma1-HD"}
SIZES = {  # double, single, heads; T5's blocks, width and hidden width; VAE's channels; guidance
    "tiny": (1, 1, 1, 1, 64, 128, (32, 32, 32, 32), False),  # to try the bench
    "heads-6": (2, 4, 6, 2, 256, 512, (32, 64, 128, 128), False),
    "heads-16": (2, 4, 16, 2, 512, 1024, (64, 128, 256, 256), False),
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


def write_flux2(folder: pathlib.Path, name: str) -> int:
    """FLUX.2 by the sizes that come with fluxbatch, ``klein-tiny`` with few and narrow layers of everything; returns
    the transformer's parameters."""
    known, flux, words, vae = _known(FLUX2[name])
    if small := name == "klein-tiny":
        flux |= dict(num_attention_heads=1, num_layers=1, num_single_layers=1, joint_attention_dim=3 * 64)
        words |= dict(hidden_size=64, intermediate_size=128, num_attention_heads=1, num_key_value_heads=1)
        vae |= dict(block_out_channels=[32] * 4)
    klein = known["pipeline"] == "Flux2KleinPipeline"
    rope = {"rope_type": "default", "rope_theta": float(words.pop("rope_theta"))}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformer = Flux2Transformer2DModel(**flux)
        autoencoder = _autoencoder(AutoencoderKLFlux2, vae)
        if klein:
            encoder = Qwen3ForCausalLM(Qwen3Config(**words, rope_parameters=rope, tie_word_embeddings=True))
        else:
            text = words | dict(model_type="mistral", rope_parameters=rope)
            encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text))
    parts = dict(
        transformer=transformer,
        text_encoder=encoder,
        vae=autoencoder,
        tokenizer=_golden("generate_flux2").tokenizer("distilled" if klein else "dev"),
        scheduler=FlowMatchEulerDiscreteScheduler(**known["scheduler"]),
    )
    pipe = Flux2KleinPipeline(**parts, is_distilled=True) if klein else Flux2Pipeline(**parts)
    pipe.save_pretrained(folder)
    return sum(p.numel() for p in transformer.parameters())


def write_flux3(folder: pathlib.Path, name: str) -> int:
    """FLUX.3 klein by the sizes that come with fluxbatch, ``flux3-tiny`` with few and narrow layers of everything;
    returns the transformer's parameters. Nothing sees pictures in its text encoder but a layer for form's sake."""
    known, sizes, speaks, vae = _known(FLUX3[name])
    words = speaks["text_config"] | {"tie_word_embeddings": True}
    if small := name == "flux3-tiny":
        sizes |= dict(num_attention_heads=1, num_layers=1, num_single_layers=1, joint_attention_dim=8 * 64)
        words |= dict(hidden_size=64, intermediate_size=128, num_attention_heads=1, num_key_value_heads=1)
        vae |= dict(block_out_channels=[32] * 4)
    thirds = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    words["rope_parameters"] = {"rope_type": "default", "rope_theta": float(words.pop("rope_theta")), **thirds}
    sees = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=words["hidden_size"])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformer = Flux3Transformer2DModel(**sizes)
        autoencoder = _autoencoder(AutoencoderKLFlux2, vae)
        config = Qwen3VLConfig(
            text_config=words, vision_config=sees | {"deepstack_visual_indexes": [0]}, tie_word_embeddings=True
        )
        encoder = Qwen3VLForConditionalGeneration(config)
    tokenizer = _golden("generate_flux3").tokenizer()
    parts = {"transformer": transformer, "vae": autoencoder, "text_encoder": encoder, "tokenizer": tokenizer}
    for part, module in parts.items():
        module.save_pretrained(folder / part)
    (folder / "modular_model_index.json").write_text(json.dumps({"_class_name": known["pipeline"]}))
    return sum(p.numel() for p in transformer.parameters())


def write_z_image(folder: pathlib.Path, name: str) -> int:
    """Z-Image by the sizes that come with fluxbatch, ``z-image-tiny`` with few and narrow layers of everything; returns
    the transformer's parameters."""
    known, sizes, words, vae = _known(Z_IMAGE[name])
    if small := name == "z-image-tiny":
        sizes |= dict(n_heads=1, n_kv_heads=1, dim=128, n_layers=1, n_refiner_layers=1, cap_feat_dim=64)
        words |= dict(hidden_size=64, intermediate_size=128, num_attention_heads=1, num_key_value_heads=1)
        vae |= dict(block_out_channels=[32] * 4)
    rope = {"rope_type": "default", "rope_theta": float(words.pop("rope_theta"))}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformer = ZImageTransformer2DModel(**sizes)
        for pad in (transformer.x_pad_token, transformer.cap_pad_token):  # what the class leaves as memory has it
            torch.nn.init.normal_(pad, std=0.02)
        autoencoder = _autoencoder(AutoencoderKL, vae)
        encoder = Qwen3ForCausalLM(Qwen3Config(**words, rope_parameters=rope, tie_word_embeddings=True))
    ZImagePipeline(
        transformer=transformer,
        text_encoder=encoder,
        vae=autoencoder,
        tokenizer=_golden("generate_flux2").tokenizer("klein"),
        scheduler=FlowMatchEulerDiscreteScheduler(**known["scheduler"]),
    ).save_pretrained(folder)
    return sum(p.numel() for p in transformer.parameters())


def write_chroma(folder: pathlib.Path, name: str) -> int:
    """Chroma by the sizes that come with fluxbatch, ``chroma-tiny`` with few and narrow layers of everything; returns
    the transformer's parameters."""
    known, sizes, words, vae = _known(CHROMA[name])
    if small := name == "chroma-tiny":
        sizes |= dict(num_attention_heads=1, num_layers=1, num_single_layers=1, joint_attention_dim=64)
        sizes |= dict(approximator_hidden_dim=64, approximator_layers=1)
        words |= dict(d_model=64, d_ff=128, num_heads=1, num_layers=1)
        vae |= dict(block_out_channels=[32] * 4)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformer = ChromaTransformer2DModel(**sizes)
        autoencoder = _autoencoder(AutoencoderKL, vae)
        encoder = T5EncoderModel(T5Config(**words))
    ChromaPipeline(
        transformer=transformer,
        text_encoder=encoder,
        vae=autoencoder,
        tokenizer=T5TokenizerFast.from_pretrained(MINI / "tokenizer_2"),
        scheduler=FlowMatchEulerDiscreteScheduler(**known["scheduler"]),
    ).save_pretrained(folder)
    return sum(p.numel() for p in transformer.parameters())


def _autoencoder(kind: Any, sizes: dict[str, Any]) -> Any:
    levels = len(sizes["block_out_channels"])
    return kind(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, **sizes)


def _known(file: str) -> tuple[dict[str, Any], ...]:
    """All that comes with fluxbatch of a checkpoint, and of it the sizes of transformer, text encoder and VAE."""
    known = yaml.safe_load((ROOT / "fluxbatch/checkpoints" / f"{file}.yaml").read_text())
    return known, *(dict(known["components"][part]) for part in ("transformer", "text_encoder", "vae"))


def _golden(name: str) -> ModuleType:
    """A module that makes goldens of the tests, for its tokenizer."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tests/golden/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    makers = dict.fromkeys(SIZES, write) | dict.fromkeys(FLUX2, write_flux2)
    makers |= dict.fromkeys(FLUX3, write_flux3) | dict.fromkeys(Z_IMAGE, write_z_image)
    makers |= dict.fromkeys(CHROMA, write_chroma)
    if len(sys.argv) != 3 or sys.argv[2] not in makers:
        sys.exit(__doc__)
    maker = makers[sys.argv[2]]
    print(f"{maker(pathlib.Path(sys.argv[1]), sys.argv[2]):,} parameters in the transformer")
