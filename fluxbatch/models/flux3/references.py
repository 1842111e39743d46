"""Reference images as FLUX.3 sees them: one is kept whole, on a canvas that its reflection fills; of several each is
cut to whole tokens, as FLUX.2's are."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from PIL import Image

from fluxbatch.models.flux2 import references

AREA, MOST_SIDE, LEAST_SIDE = 4 * 1024 * 1024, 4096, 64  # pixels of a canvas
BACK = 0.995  # by which a picture is made smaller until its canvas is small enough

Size = tuple[int, int]  # width, height


def fault(size: Size, count: int, size_multiple: int) -> str | None:
    """Why a picture of this size cannot be one of ``count`` references; None if it can."""
    if count > 1 and min(references.reference_size(size, size_multiple)) < size_multiple:
        return f"{size[0]}×{size[1]} pixels, expected at least {size_multiple} on each side of one among several"
    return None


def whole(size: Size, size_multiple: int) -> tuple[Size, Size]:
    """Of a picture kept whole: its size, perhaps made smaller, and its canvas's."""
    scale = min(1.0, math.sqrt(AREA / (size[0] * size[1])), MOST_SIDE / max(size))
    while True:
        width, height = (max(1, round(side * scale)) for side in size)
        canvas = _canvas(width, size_multiple), _canvas(height, size_multiple)
        if canvas[0] * canvas[1] <= AREA:
            return (width, height), canvas
        scale *= BACK


def _canvas(side: int, size_multiple: int) -> int:
    return min(MOST_SIDE, max(LEAST_SIDE, -(-side // size_multiple) * size_multiple))


def reference_size(size: Size, count: int, size_multiple: int) -> Size:
    """What the VAE sees of a picture of this size, one of ``count``."""
    return whole(size, size_multiple)[1] if count == 1 else references.reference_size(size, size_multiple)


def box(size: Size, size_multiple: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a picture on its canvas."""
    (width, height), canvas = whole(size, size_multiple)
    left, top = (canvas[0] - width) // 2, (canvas[1] - height) // 2
    return left, top, left + width, top + height


def prepare(image: Image.Image, count: int, size_multiple: int) -> np.ndarray:
    """``[H, W, 3]`` float32 in -1..1."""
    if count > 1:
        return references.prepare(image, size_multiple)
    size, (width, height) = whole(image.size, size_multiple)
    left, top, right, bottom = box(image.size, size_multiple)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    # a reflection leaves the edge out; of a picture that is smaller than a token it would be too short
    mode: Literal["reflect", "symmetric"] = "reflect" if min(size) > size_multiple else "symmetric"
    padding = (top, height - bottom), (left, width - right), (0, 0)
    pixels = np.pad(np.asarray(image.convert("RGB")), padding, mode=mode)
    return 2 * (pixels.astype(np.float32) / np.float32(255)) - 1
