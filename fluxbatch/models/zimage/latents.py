"""Latents of Z-Image: those of FLUX.1's VAE, in tokens of 2×2 with the channels last."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def pack(latents: np.ndarray) -> np.ndarray:
    """``[C, h, w]`` → ``[h/2 · w/2, 4C]``: of each patch row, column, channel."""
    c, h, w = latents.shape
    return latents.reshape(c, h // 2, 2, w // 2, 2).transpose(1, 3, 2, 4, 0).reshape(h // 2 * (w // 2), 4 * c)


def unpack(tokens: jax.Array, height: int, width: int) -> jax.Array:
    """``[B, L, 4C]`` → ``[B, height, width, C]``."""
    b, _, c = tokens.shape
    patches = tokens.reshape(b, height // 2, width // 2, 2, 2, c // 4)
    return jnp.swapaxes(patches, 2, 3).reshape(b, height, width, c // 4)
