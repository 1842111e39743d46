"""Noise as torch draws it on the CPU: the seed of a row gives the picture that it gives in diffusers."""

from __future__ import annotations

import numpy as np


def torch_normal(seed: int, size: int) -> np.ndarray:
    """``size`` ≥ 16 float32 normals, as ``torch.randn`` draws them on the CPU after ``manual_seed(seed)``.

    Mersenne Twister, 24 bits a value, Box-Muller over blocks of 16 (8 radii, 8 angles); a last
    partial block is replaced by 16 fresh values. Equal to torch within float32 rounding.
    """
    if size < 16:
        raise ValueError(f"noise of {size} values: at least 16 are needed")
    state = np.random.RandomState(seed & 0xFFFFFFFF)  # torch keeps the low 32 bits
    tail = 16 if size % 16 else 0
    raw = state.randint(0, 2**32, size=size + tail, dtype=np.uint32)
    uniform = (raw & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    normal = np.empty(size, np.float32)
    whole = size - size % 16
    normal[:whole] = _box_muller(uniform[:whole].reshape(-1, 2, 8)).reshape(-1)
    if tail:
        normal[-16:] = _box_muller(uniform[size:].reshape(1, 2, 8)).reshape(-1)
    return normal


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - uniform[:, 0]))
    angle = np.float32(2 * np.pi) * uniform[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
