"""Pixels ↔ image files: PNG, JPEG and WebP with the image's parameters inside."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from fluxbatch.config.schema import MAX_SIDE
from fluxbatch.types import Row

EXTENSIONS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
# what was written is read again; by default Pillow takes the larger ones for an attack
Image.MAX_IMAGE_PIXELS = MAX_SIDE**2

OWN, INFOTEXT = "fluxbatch", "parameters"  # what a file says of itself: all of it as JSON; what other programs read
_IMAGE_DESCRIPTION, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x8769, 0x9286
_JPEG_SEGMENT = 65_000  # a JPEG segment holds less than 64 KiB, and EXIF must fit into one


def encode(pixels: np.ndarray, format: str, *, text: Mapping[str, str], png_level: int, quality: int) -> bytes:
    """``pixels`` (uint8 [H, W, 3]) as the bytes of a file; the same input gives the same bytes.

    ``text`` goes into iTXt chunks (PNG), or as one JSON object into EXIF ImageDescription and its infotext into
    UserComment (JPEG, WebP), where a JPEG too small for it does without: the record has everything anyway.
    """
    image = Image.fromarray(_checked(pixels))
    out = io.BytesIO()
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        for key, value in text.items():
            chunks.add_itxt(key, value)
        image.save(out, "PNG", compress_level=png_level, pnginfo=chunks)
    elif format in ("jpeg", "webp"):
        exif = Image.Exif()
        exif[_IMAGE_DESCRIPTION] = json.dumps({key: value for key, value in text.items() if key != INFOTEXT})
        if INFOTEXT in text:
            exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text[INFOTEXT].encode("utf-16-be", "surrogatepass")
        data = exif.tobytes()
        if format == "jpeg" and len(data) > _JPEG_SEGMENT:
            data = b""
        image.save(out, format.upper(), quality=quality, exif=data)
    else:
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(EXTENSIONS)}")
    return out.getvalue()


def decode(data: bytes) -> np.ndarray:
    """An image file's pixels, uint8 [H, W, 3]. Raises ValueError when it is damaged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:  # which speaks of Python's objects
        raise ValueError("not a whole image: its first bytes are not those of an image file") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a whole image: {error}") from None


def parameters(data: bytes) -> dict[str, Any]:
    """What a JPEG or WebP file says of itself, as ``encode`` was told under that name; empty if nothing. Raises
    ValueError when that is damaged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            text: Any = image.getexif().get(_IMAGE_DESCRIPTION)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"what it says of itself is damaged: {error}") from None
    try:
        said = json.loads(text)
        found = json.loads(said.get(OWN) or said[INFOTEXT])  # where our own text was until 0.1.0
    except (TypeError, ValueError, KeyError, AttributeError):  # no such text, or another program's
        return {}
    return found if isinstance(found, dict) else {}


def infotext(record: Mapping[str, Any]) -> str:
    """A record's parameters as AUTOMATIC1111's web UI writes them under ``parameters``, and many programs read them."""
    lines = [record["prompt"]]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    model = record.get("model", "")
    settings = {
        "Steps": record["num_inference_steps"],
        "Sampler": "Euler",
        "CFG scale": f"{record['guidance_scale']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": json.dumps(model, ensure_ascii=False) if re.search("[,:\n]", model) else model,
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value != ""))
    return "\n".join(lines)


def cropped(row: Row, pixels: np.ndarray) -> np.ndarray:
    """What is kept of the row's image."""
    if not row.crop:
        return pixels
    left, top, right, bottom = row.crop
    return np.ascontiguousarray(pixels[top:bottom, left:right])


def pixel_sha256(pixels: np.ndarray) -> str:
    """Hex sha256 of the raw RGB bytes with their shape, so that a reshaped image differs."""
    pixels = np.ascontiguousarray(_checked(pixels))
    digest = hashlib.sha256("x".join(map(str, pixels.shape)).encode())
    digest.update(pixels.data)
    return digest.hexdigest()


def is_flat(pixels: np.ndarray) -> bool:
    """Whether the whole image has one colour."""
    return bool((pixels == pixels[:1, :1]).all())


def _checked(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels: got {pixels.dtype} {pixels.shape}, expected uint8 [H, W, 3]")
    return pixels
