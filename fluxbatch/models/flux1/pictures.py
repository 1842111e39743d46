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


# Width and height of what Kontext was trained on: the one of the nearest aspect is what the VAE sees of a picture.
PREFERRED = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip


def reference_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Height and width of a reference picture of this size as Kontext reads it."""
    ratio = (width // multiple * multiple) / (height // multiple * multiple)
    _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED)
    return height // multiple * multiple, width // multiple * multiple


def mask_channels(mask: np.ndarray, scale: int) -> np.ndarray:
    """``[H, W]`` bool → tokens ``[L, 4 · scale²]`` float32: the pixels of each latent as its channels, packed."""
    height, width = (side // scale for side in mask.shape)
    blocks = mask.reshape(height, scale, width, scale).transpose(1, 3, 0, 2)
    return pack(blocks.reshape(scale * scale, height, width).astype(np.float32))


def prepare(row: Row, images: Mapping[str, Sequence[Image.Image]], vae: VaeConfig) -> dict[str, np.ndarray]:
    """For a row that starts from its image, and may keep what lies outside a mask."""
    height, width = row.height, row.width
    found = {"image": pixels(images["image"][0], height, width)}
    found["epsilon"] = draws(row.seed, 1, height, width, vae)[0].transpose(1, 2, 0)
    if row.mode.mask:
        mask = mask_pixels(images["mask_image"][0], height, width)[:: vae.scale, :: vae.scale]  # as nearest takes it
        found["mask"] = pack(np.repeat(mask[None].astype(np.float32), vae.latent_channels, 0))
    return found


def encode(
    encoder: Encoder, image: jax.Array, epsilon: jax.Array | None, vae: VaeConfig, dtype: jnp.dtype
) -> jax.Array:
    """``[B, H, W, 3]`` → tokens ``[B, L, 4C]`` float32 of a sample, which ``epsilon`` ``[B, h, w, C]`` decides; of
    the mean without it."""
    mean, logvar = (x.astype(jnp.float32) for x in encoder(image.astype(dtype)))
    sample = mean if epsilon is None else mean + jnp.exp(0.5 * logvar) * epsilon
    return packed((sample - vae.shift_factor) * vae.scaling_factor)
