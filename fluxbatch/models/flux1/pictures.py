"""Pictures as FLUX.1 reads them: prepared as diffusers prepares them, encoded, packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

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


REFERENCE = 1024
# Width and height of what Kontext was trained on: the one of the nearest aspect is what the VAE sees of a picture.
PREFERRED = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip


def reference_size(height: int, width: int, multiple: int, resolution: int = REFERENCE) -> tuple[int, int]:
    """Height and width of a reference picture of this size as Kontext, trained on references of about
    ``resolution`` × ``resolution`` pixels, reads it."""
    ratio = (width // multiple * multiple) / (height // multiple * multiple)
    _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED)
    height, width = (side * resolution // REFERENCE for side in (height, width))
    return height // multiple * multiple, width // multiple * multiple


def mask_channels(mask: np.ndarray, scale: int) -> np.ndarray:
    """``[H, W]`` bool → tokens ``[L, 4 · scale²]`` float32: the pixels of each latent as its channels, packed."""
    height, width = (side // scale for side in mask.shape)
    blocks = mask.reshape(height, scale, width, scale).transpose(1, 3, 0, 2)
    return pack(blocks.reshape(scale * scale, height, width).astype(np.float32))


def crop_box(mask: Image.Image, row: Row) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is drawn of a picture: all that is not black in its mask, with the row's
    padding, as wide or high as the aspect asks for and the picture has. ValueError for a black mask."""
    assert row.padding_mask_crop is not None
    if (box := mask.convert("L").getbbox()) is None:
        raise ValueError("mask_image: all of it is black: nothing is to be drawn anew")
    pad, ratio = row.padding_mask_crop, row.width / row.height
    x1, y1 = max(box[0] - pad, 0), max(box[1] - pad, 0)
    x2, y2 = min(box[2] + pad, mask.width), min(box[3] + pad, mask.height)
    if (x2 - x1) / (y2 - y1) > ratio:
        y1, y2 = _longer(y1, y2, int((x2 - x1) / ratio - (y2 - y1)), mask.height)
    else:
        x1, x2 = _longer(x1, x2, int((y2 - y1) * ratio - (x2 - x1)), mask.width)
    return x1, y1, x2, y2


def _longer(first: int, last: int, by: int, limit: int) -> tuple[int, int]:
    """Longer on both sides alike; moved where it would not lie in 0..limit, and cut where it has no room."""
    first, last = first - by // 2, last + by - by // 2
    first, last = first - max(last - limit, 0), min(last, limit)
    return max(first, 0), min(last + max(-first, 0), limit)


def _within(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resized to fit and centred; its outermost pixels fill the rest."""
    ratio, own = width / height, image.width / image.height
    w = width if ratio < own else image.width * height // image.height
    h = height if ratio >= own else image.height * width // image.width
    image = image.resize((w, h), Image.Resampling.LANCZOS)
    left, top = width // 2 - w // 2, height // 2 - h // 2
    whole = Image.new("RGB", (width, height))
    whole.paste(image, (left, top))
    if ratio < own and top:
        whole.paste(image.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        whole.paste(image.resize((width, top), box=(0, h, width, h)), (0, top + h))
    elif ratio > own and left:
        whole.paste(image.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        whole.paste(image.resize((left, height), box=(w, 0, w, height)), (left + w, 0))
    return whole


def _filling(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resized to fill, centred, and what is too much cut off."""
    ratio, own = width / height, image.width / image.height
    w = width if ratio > own else image.width * height // image.height
    h = height if ratio <= own else image.height * width // image.width
    whole = Image.new("RGB", (width, height))
    whole.paste(image.resize((w, h), Image.Resampling.LANCZOS), (width // 2 - w // 2, height // 2 - h // 2))
    return whole


def pasted(row: Row, drawn: np.ndarray, image: Image.Image, mask: Image.Image) -> np.ndarray:
    """uint8 ``[H, W, 3]``: the picture, with what was drawn of its crop where the mask is white."""
    left, top, right, bottom = crop_box(mask, row)
    whole = Image.new("RGBA", image.size)
    whole.paste(_filling(Image.fromarray(drawn), right - left, bottom - top), (left, top))
    kept = Image.new("RGBa", image.size)
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    whole = whole.convert("RGB").convert("RGBA")
    whole.alpha_composite(kept.convert("RGBA"))
    return np.asarray(whole.convert("RGB"))


def prepare(row: Row, images: Mapping[str, Sequence[Image.Image]], vae: VaeConfig) -> dict[str, np.ndarray]:
    """For a row that starts from its image, and may keep what lies outside a mask."""
    height, width = row.height, row.width
    image, *masks = images["image"][0], *images.get("mask_image", ())
    if row.padding_mask_crop is not None:
        box = crop_box(masks[0], row)
        image, *masks = (_within(each.crop(box), width, height) for each in (image.convert("RGB"), *masks))
    found = {"image": pixels(image, height, width)}
    found["epsilon"] = draws(row.seed, 1, height, width, vae)[0].transpose(1, 2, 0)
    if row.mode.mask:
        mask = mask_pixels(masks[0], height, width)[:: vae.scale, :: vae.scale]  # as nearest takes it
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
