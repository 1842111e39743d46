"""Pictures as FLUX.1 reads them: prepared as diffusers prepares them, encoded, packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fluxbatch.models.autoencoder import Encoder, VaeConfig
from fluxbatch.models.latents import pack, packed
from fluxbatch.models.noise import torch_normal
from fluxbatch.types import Row


def pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
    """``[height, width, 3]`` float32 in -1..1; the aspect is not kept."""
    image = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return 2 * (np.asarray(image, np.float32) / np.float32(255)) - 1


def mask_pixels(mask: Image.Image, height: int, width: int) -> np.ndarray:
    """``[height, width]`` bool: where the image is to be drawn anew."""
    mask = mask.resize((width, height), Image.Resampling.LANCZOS).convert("L")
    return np.asarray(mask, np.float32) / np.float32(255) >= 0.5


def draws(seed: int, count: int, height: int, width: int, vae: VaeConfig) -> list[np.ndarray]:
    """The first ``count`` draws ``[C, h, w]`` of a row, one after another."""
    shape = vae.latent_channels, height // vae.scale, width // vae.scale
    return list(torch_normal(seed, count * int(np.prod(shape))).reshape(count, *shape))


def prepare(row: Row, images: Mapping[str, Sequence[Image.Image]], vae: VaeConfig) -> dict[str, np.ndarray]:
    """For a row that starts from its image, and may keep what lies outside a mask."""
    height, width = row.height, row.width
    found = {"image": pixels(images["image"][0], height, width)}
    found["epsilon"] = draws(row.seed, 1, height, width, vae)[0].transpose(1, 2, 0)
    if row.mode.mask:
        mask = mask_pixels(images["mask_image"][0], height, width)[:: vae.scale, :: vae.scale]  # as nearest takes it
        found["mask"] = pack(np.repeat(mask[None].astype(np.float32), vae.latent_channels, 0))
    return found


def encode(encoder: Encoder, image: jax.Array, epsilon: jax.Array, vae: VaeConfig, dtype: jnp.dtype) -> jax.Array:
    """``[B, H, W, 3]`` → tokens ``[B, L, 4C]`` float32 of a sample, which ``epsilon`` ``[B, h, w, C]`` decides."""
    mean, logvar = (x.astype(jnp.float32) for x in encoder(image.astype(dtype)))
    sample = mean + jnp.exp(0.5 * logvar) * epsilon
    return packed((sample - vae.shift_factor) * vae.scaling_factor)
