"""FLUX.2's parts strung together, one row at a time, with reference images, which the runner does not take."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.models.flux2 import autoencoder, keys, latents, mistral, qwen3, references, text, transformer
from fluxbatch.models.flux2.schedule import Flux2Schedule
from fluxbatch.models.noise import torch_normal
from fluxbatch.weights import load
from fluxbatch.weights.headers import read_headers
from fluxbatch.weights.source import Source

# class in model_index.json → config, module, key table, how a prompt is written
ENCODERS = {
    "Qwen3ForCausalLM": (qwen3.Qwen3Config, qwen3.Qwen3Encoder, keys.QWEN3, text.KLEIN),
    "Mistral3ForConditionalGeneration": (mistral.MistralConfig, mistral.MistralEncoder, keys.MISTRAL, text.DEV),
}


def opened(folder: Path | str, module, config, table, stem: str, dtype=np.float32) -> nnx.Module:
    """The weights of a folder in our model: through files, tables and TensorStore. ``table``: or what makes it of the
    tensors."""
    source = Source(str(folder))
    cfg, tensors = config.from_json(source.json("config.json")), read_headers(source, (stem,))
    table = table(tensors) if callable(table) else table
    return load.load(load.plan(lambda rngs: module(cfg, rngs=rngs), tensors, table, source), make_mesh((1, 1)), dtype)


def transformer_table(tensors):
    return keys.transformer_diffusers(keys.sizes_of(tensors))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(graph, method, state, *args):
    return getattr(nnx.merge(graph, state), method)(*args)


@functools.partial(jax.jit, static_argnums=0)
def velocity(graph, state, x, words, mod, step, rope, refs):
    return nnx.merge(graph, state).velocity(x, words, jax.tree.map(lambda m: m[:, step], mod), rope, refs)


@dataclasses.dataclass
class Pipeline:
    flux: nnx.Module
    encoder: nnx.Module
    vae_decoder: nnx.Module
    vae_encoder: nnx.Module
    tokenizer: text.ChatTokenizer
    schedule: Flux2Schedule
    vae: autoencoder.Flux2VaeConfig
    cfg_scale: bool  # guidance is a second evaluation without the prompt, else it is embedded or ignored
    dtype: Any

    @classmethod
    def open(cls, folder: Path, dtype=np.float32) -> Pipeline:
        index = Source(str(folder)).json("model_index.json")
        config, module, table, chat = ENCODERS[index["text_encoder"][1]]
        stem, vae = "diffusion_pytorch_model", folder / "vae"
        half = functools.partial(opened, vae, config=autoencoder.Flux2VaeConfig, stem=stem, dtype=dtype)
        flux = opened(
            folder / "transformer", transformer.Flux2, transformer.Flux2Config, transformer_table, stem, dtype
        )
        return cls(
            flux,
            opened(folder / "text_encoder", module, config, table, "model", dtype),
            half(module=autoencoder.Decoder, table=keys.VAE_DECODER_DIFFUSERS),
            half(module=autoencoder.Encoder, table=keys.VAE_ENCODER_DIFFUSERS),
            text.ChatTokenizer(str(folder / "tokenizer"), chat),
            Flux2Schedule.of(Source(str(folder / "scheduler")).json("scheduler_config.json")),
            autoencoder.Flux2VaeConfig.from_json(Source(str(vae)).json("config.json")),
            index["_class_name"] == "Flux2KleinPipeline" and not index.get("is_distilled"),
            dtype,
        )

    def encode(self, prompt: str, length: int) -> jax.Array:
        ids, mask = self.tokenizer([prompt], length)
        graph, state = nnx.split(self.encoder)
        return _call(graph, state, ids, mask, self.dtype)

    def draw(self, row: dict, length: int, images: Sequence[Image.Image] = (), negative: str = "") -> np.ndarray:
        """The picture of a row: uint8 ``[H, W, 3]``."""
        graph, state = nnx.split(self.flux)
        side = self.vae.scale
        pixels = [references.prepare(image, side) for image in images]
        height, width = (
            row.get(key) or (pixels[0].shape[axis] if pixels else 64 * side)
            for axis, key in enumerate(("height", "width"))
        )
        rows, cols = height // side, width // side
        guided = self.cfg_scale and row["guidance_scale"] > 1

        words = [
            _embed_text(graph, state, self.encode(p, length), self.dtype)
            for p in [row["prompt"], *([negative] if guided else [])]
        ]
        refs = None
        if pixels:
            vae, weights = nnx.split(self.vae_encoder)
            patches = [run(vae, "__call__", weights, jnp.asarray(p[None], self.dtype)) for p in pixels]
            refs = run(
                graph, "embed_image", state, jnp.concatenate([p.reshape(1, -1, p.shape[-1]) for p in patches], axis=1)
            )
        sizes = tuple((p.shape[0] // side, p.shape[1] // side) for p in pixels)
        rope = transformer.rope_table(self.flux.cfg, length, rows, cols, sizes)

        x = latents.noise(functools.partial(torch_normal, row["seed"]), self.flux.cfg.in_channels, rows, cols)[None]
        sigmas = self.schedule.sigmas(row["num_inference_steps"], rows * cols)
        mod = _modulate(graph, state, sigmas[None, :-1], np.float32([row["guidance_scale"]]), self.dtype)
        for i in range(len(sigmas) - 1):
            v = [
                np.asarray(velocity(graph, state, x.astype(self.dtype), w, mod, i, rope, refs), np.float32)
                for w in words
            ]
            v = v[1] + row["guidance_scale"] * (v[0] - v[1]) if guided else v[0]
            x = x + (sigmas[i + 1] - sigmas[i]) * v

        vae, weights = nnx.split(self.vae_decoder)
        image = run(vae, "__call__", weights, latents.grid(jnp.asarray(x, self.dtype), rows, cols))
        return np.round(np.clip(np.asarray(image[0], np.float32) * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _call(graph, state, ids, mask, dtype):
    return nnx.merge(graph, state)(ids, mask, dtype)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _embed_text(graph, state, words, dtype):
    return nnx.merge(graph, state)._embed_text(words, dtype)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _modulate(graph, state, times, guidance, dtype):
    return nnx.merge(graph, state)._modulation(times, guidance, dtype)
