"""Packing: latents ``[C, h, w]`` as tokens, each a 2×2 patch of 4·C channels, and back."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def pack(latents: np.ndarray) -> np.ndarray:
    """``[C, h, w]`` → ``[h/2 · w/2, 4C]``: each token is a 2×2 patch, channels first."""
    c, h, w = latents.shape
    return latents.reshape(c, h // 2, 2, w // 2, 2).transpose(1, 3, 0, 2, 4).reshape(h // 2 * (w // 2), c * 4)


def packed(latents: Float[Array, "B h w C"]) -> Float[Array, "B (h//2)*(w//2) 4*C"]:
    """The same on a device."""
    b, h, w, c = latents.shape
    patches = jnp.transpose(latents.reshape(b, h // 2, 2, w // 2, 2, c), (0, 1, 3, 5, 2, 4))
    return patches.reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(
    tokens: Float[Array | np.ndarray, "B L C"], height: int, width: int
) -> Float[Array, "B {height} {width} C//4"]:
    """Latents of tokens."""
    b, _, c = tokens.shape
    patches = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return jnp.transpose(patches, (0, 1, 4, 2, 5, 3)).reshape(b, height, width, c // 4)
