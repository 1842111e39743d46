"""Reference images as FLUX.2 sees them: pictures of any size to pixels that the VAE encodes."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

AREA = 1024 * 1024  # a larger picture is made smaller
LEAST_SIDE, MOST_RATIO = 64, 8


def fault(size: tuple[int, int]) -> str | None:
    """Why a picture of this width and height cannot be a reference; None if it can."""
    width, height = size
    if min(size) < LEAST_SIDE:
        return f"{width}×{height} pixels, expected at least {LEAST_SIDE} on each side"
    if max(size) / min(size) > MOST_RATIO:
        return f"{width}×{height} pixels, expected at most {MOST_RATIO} times as many on one side as on the other"
    return None


def shrunk(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a picture after it has been made smaller, if it was too large."""
    width, height = size
    if width * height <= AREA:
        return size
    scale = math.sqrt(AREA / (width * height))
    return int(width * scale), int(height * scale)


def reference_size(size: tuple[int, int], size_multiple: int) -> tuple[int, int]:
    """Width and height of what the VAE sees of a picture of this size; of the first of a row the image to be drawn has
    the same unless the row says another. ``multiple``: pixels of a token's side."""
    width, height = shrunk(size)
    return width - width % size_multiple, height - height % size_multiple


def prepare(image: Image.Image, size_multiple: int) -> np.ndarray:
    """``[H, W, 3]`` float32 in -1..1: made smaller if it is too large, and cut to whole tokens around its centre."""
    if image.size != (smaller := shrunk(image.size)):
        image = image.resize(smaller, Image.Resampling.LANCZOS)
    width, height = reference_size(image.size, size_multiple)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = image.crop((left, top, left + width, top + height)).convert("RGB")
    return 2 * (np.asarray(pixels).astype(np.float32) / np.float32(255)) - 1
