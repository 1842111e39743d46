"""Latents of FLUX.2: noise is drawn, and kept, as 2×2 patches; the VAE's latents are their normed or denormed pixels.

Channel order within a patch is that of FLUX.1's packing: latent channel, then row, then column. Shapes: C latent
channels, y × x patches, of which each is one token.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

PATCH = 2


def noise(normal: Callable[[int], np.ndarray], channels: int, rows: int, cols: int) -> np.ndarray:
    """``[y·x, 4C]`` float32 of ``channels`` = 4C, of a row's own ``normal(size)`` draws: those of one channel come
    together."""
    return np.ascontiguousarray(normal(channels * rows * cols).reshape(channels, rows * cols).T)


def grid(tokens: jax.Array, rows: int, cols: int) -> jax.Array:
    """``[B, y·x, 4C]`` → ``[B, y, x, 4C]``, as the VAE takes them."""
    return tokens.reshape(tokens.shape[0], rows, cols, tokens.shape[-1])


def patchify(latents: jax.Array) -> jax.Array:
    """``[B, 2y, 2x, C]`` → ``[B, y, x, 4C]``."""
    b, h, w, c = latents.shape
    patches = latents.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return jnp.transpose(patches, (0, 1, 3, 5, 2, 4)).reshape(b, h // PATCH, w // PATCH, c * PATCH**2)


def unpatchify(patches: jax.Array) -> jax.Array:
    """Undoes ``patchify``."""
    b, rows, cols, c = patches.shape
    parts = patches.reshape(b, rows, cols, c // PATCH**2, PATCH, PATCH)
    return jnp.transpose(parts, (0, 1, 4, 2, 5, 3)).reshape(b, rows * PATCH, cols * PATCH, c // PATCH**2)
