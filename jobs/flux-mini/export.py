"""Writes trained parameters as a diffusers pipeline, through the name tables that loading uses."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from fluxbatch.distributed.mesh import Pairs
from fluxbatch.models import autoencoder_keys
from fluxbatch.models.flux1 import keys
from fluxbatch.models.key_tables import Table, split_layer

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
INDEX = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
         "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"],
         "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
         "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}  # fmt: skip


def arrays_of(state: Any) -> dict[str, np.ndarray]:
    """A state's arrays by their paths, in the order that checkpoints have."""
    return {
        ".".join(map(str, keys)): paired(np.asarray(leaf.get_value()), leaf.get_metadata()["axes"])
        for keys, leaf in nnx.to_flat_state(state)
    }


def paired(array: Any, axes: tuple[Any, ...]) -> Any:
    """What the model rotates half by half, as checkpoints have it: pair by pair."""
    for i, axis in enumerate(axes):
        array = axis.paired(array, i - len(axes)) if isinstance(axis, Pairs) else array
    return array


def halved(array: Any, axes: tuple[Any, ...]) -> Any:
    """The other way round."""
    for i, axis in enumerate(axes):
        array = axis.halved(array, i - len(axes)) if isinstance(axis, Pairs) else array
    return array


def named(arrays: Mapping[str, np.ndarray], table: Table) -> dict[str, np.ndarray]:
    """Arrays by the names that a checkpoint has for them: the table read backwards. bfloat16."""
    out: dict[str, np.ndarray] = {}
    for rule in table.rules:
        count = len(re.findall(r"\(\\d\+\)", rule.pattern))
        for numbers in [()] if count == 0 else np.ndindex(*[40] * count):
            path, layer = split_layer(rule.target.format(*numbers))
            if path not in arrays or ("[" in rule.target and layer >= len(arrays[path])):
                continue
            value = arrays[path][layer] if "[" in rule.target else arrays[path]
            if rule.rows == keys.SWAP_HALVES:
                value = np.concatenate(np.split(value, 2)[::-1])
            # prefixes written, the last name of several
            name = re.sub(r"\(\?:(?:[^)]*\|)?([^)|]*)\)\??", r"\1", rule.pattern)
            for number in numbers:
                name = name.replace(r"(\d+)", str(number), 1)
            out[name.replace("\\", "")] = np.ascontiguousarray(value.astype(ml_dtypes.bfloat16))
    if missing := len(arrays) - len({split_layer(p)[0] for p in arrays}):
        raise ValueError(f"{missing} arrays without a name")
    return out


def write(
    folder: pathlib.Path,
    vae: dict | None,
    flux: dict,
    text: Mapping[str, dict],
    vae_params: Any,
    params: Mapping[str, Any],
    scheduler: dict = SCHEDULER,
    index: dict = INDEX,
) -> None:
    """Configs and weights (bfloat16) beside the tokenizers that are there already; and the VAE, unless it is too."""
    parts_of = lambda state, table: named(arrays_of(state), table)  # noqa: E731
    parts = {
        "transformer": (
            {"_class_name": "FluxTransformer2DModel", "patch_size": 1} | flux,
            parts_of(params["flux"], keys.FLUX_DIFFUSERS),
        ),
        "text_encoder": (
            {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"} | text["clip"],
            parts_of(params["clip"], keys.CLIP),
        ),
        "text_encoder_2": (
            {
                "architectures": ["T5EncoderModel"],
                "model_type": "t5",
                "tie_word_embeddings": False,
                "is_encoder_decoder": False,
            }
            | text["t5"],
            parts_of(params["t5"], keys.T5),
        ),
    }
    if vae is not None:
        levels = len(vae["block_out_channels"])
        vae = {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "in_channels": 3,
            "out_channels": 3,
            "force_upcast": False,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        } | vae
        parts["vae"] = (
            vae,
            parts_of(vae_params[0], autoencoder_keys.VAE_ENCODER)
            | parts_of(vae_params[1], autoencoder_keys.VAE_DECODER),
        )
    for name, (config, tensors) in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        file = folder / name / f"{stem}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        file.with_name(f"{file.name}.sha256").write_text(
            f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        )
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
